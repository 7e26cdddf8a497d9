"""Any causal language model of ``transformers`` as a list of layers for a pipeline, and back.

The layers run the model's own code: :mod:`anatomy` finds its decoder layers and what comes before and after them,
:mod:`parts` runs its ``forward`` with everything else taken out, :mod:`weights` reads and writes safetensors part by part,
:mod:`adapters` adds LoRA.
"""

from ds_decoupled.models.hugging_face.convert import from_hugging_face
from ds_decoupled.models.hugging_face.export import to_hugging_face

__all__ = ["from_hugging_face", "to_hugging_face"]
