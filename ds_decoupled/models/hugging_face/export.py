"""From a pipeline's ranks back to a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_decoupled.collectives import gather
from ds_decoupled.errors import ConfigError
from ds_decoupled.models.hugging_face.adapters import adapters, merged
from ds_decoupled.models.hugging_face.parts import EmbeddingPart, HeadPart, Part
from ds_decoupled.models.hugging_face.weights import INDEX, SINGLE


def to_hugging_face(engine: Any, path: str | Path, *, merge_adapters: bool = True) -> None:
    """Write the model of ``engine`` as a Hugging Face checkpoint; every rank must call it, and each writes its own layers.

    Weights are written as they are now, in the type in which the engine holds them; call ``drain()`` before, so that every
    stage has made the same updates.

    Args:
        engine: one that trains the layers of :func:`from_hugging_face` on any number of ranks.
        path: a folder; made if it is not there.
        merge_adapters: with LoRA: add the adapters into the weights, for ``AutoModelForCausalLM.from_pretrained``. Otherwise
            write the adapters alone, for ``PeftModel.from_pretrained``.

    Raises:
        ConfigError: if the model did not come from :func:`from_hugging_face`, on every rank.
        OSError: if any rank could not write, on every rank.
    """
    folder = Path(path)
    # Of a tied pair every rank that holds one end has built both.
    ends = ((EmbeddingPart, engine.is_first_stage()), (HeadPart, engine.is_last_stage()))
    unused = tuple(kind for kind, used in ends if not used)
    parts = [part for part in engine.module.modules() if isinstance(part, Part) and not isinstance(part, unused)]
    if not all(gather(bool(parts))):
        raise ConfigError("model", type(engine.module).__name__, "its layers are not those of from_hugging_face()")
    conversion = parts[0].conversion
    if conversion.peft_config is not None and not merge_adapters:
        _write_adapters(engine, parts, folder)
        return
    rank, ranks = engine.grid.get_pipe_parallel_rank(), engine.grid.get_pipe_parallel_world_size()
    filename = SINGLE if ranks == 1 else f"model-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= _tensors(part)
    writes = engine.grid.get_data_parallel_rank() == 0
    _write(folder, filename, tensors if writes else {})
    sizes = gather({name: (filename, t.nbytes) for name, t in tensors.items()} if writes else {})
    if dist.get_rank() == 0:
        found = {name: entry for part in sizes for name, entry in part.items()}
        if ranks > 1:
            index = {"metadata": {"total_size": sum(size for _, size in found.values())},
                     "weight_map": {name: file for name, (file, _) in sorted(found.items())}}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        config = copy.deepcopy(conversion.config)
        config.architectures = [conversion.model_class.__name__]
        config.dtype = next(iter(tensors.values())).dtype
        if conversion.anatomy.tied and conversion.anatomy.output_weight in found:
            config.get_text_config().tie_word_embeddings = False
            config.tie_word_embeddings = False
        config.save_pretrained(folder)
    dist.barrier()


def _tensors(part: Part) -> dict[str, Tensor]:
    """The weights of ``part``; the unembedding is left out where it is the embedding."""
    values = {name: t.detach().contiguous().cpu() for name, t in merged(part.root).items()}
    anatomy = part.conversion.anatomy
    if isinstance(part, HeadPart) and anatomy.tied and not part.conversion.untied:
        layer = part.root.get_submodule(anatomy.output_weight.rpartition(".")[0])
        if not hasattr(layer, "get_delta_weight"):
            del values[anatomy.output_weight]
    return values


def _write(folder: Path, filename: str, tensors: dict[str, Tensor]) -> None:
    """Write one rank's file; an error on one rank is an error on all."""
    from safetensors.torch import save_file

    failure = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if tensors:
            save_file(tensors, folder / filename, metadata={"format": "pt"})
    except Exception as error:
        failure = f"rank {dist.get_rank()} could not write {folder / filename}: {error}"
    failures = [text for text in gather(failure) if text]
    if failures:
        raise OSError(failures[0])


def _write_adapters(engine: Any, parts: list[Part], folder: Path) -> None:
    """All adapters in one file, from rank 0: they are small."""
    own: dict[str, Tensor] = {}
    if engine.grid.get_data_parallel_rank() == 0:
        for part in parts:
            own |= {name: t.contiguous().cpu() for name, t in adapters(part.root).items()}
    everything: dict[str, Tensor] = {}
    for some in gather(own):
        everything |= some
    _write(folder, "adapter_model.safetensors", everything if dist.get_rank() == 0 else {})
    if dist.get_rank() == 0:
        config = copy.deepcopy(parts[0].conversion.peft_config)
        config.inference_mode = True
        config.save_pretrained(folder)
    dist.barrier()


