"""From a causal language model of ``transformers`` to a list of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.pipe import LayerSpec, TiedLayerSpec

from ds_decoupled.errors import ConfigError
from ds_decoupled.models.hugging_face.anatomy import Anatomy, dissect, skeleton
from ds_decoupled.models.hugging_face.conversion import Conversion
from ds_decoupled.models.hugging_face.folder import check_quantization
from ds_decoupled.models.hugging_face.parts import DecoderPart, EmbeddingPart, HeadPart, TiedEnds, tied_head
from ds_decoupled.models.hugging_face.weights import GENERATION, InMemory, SafetensorsFolder, Source
from ds_decoupled.nn import mark_block

TIED_KEY = "embeddings"


def from_hugging_face(model_or_path: Any, *, untie_embeddings: bool = False, peft_config: Any = None,
                      attn_implementation: str | None = None) -> list[LayerSpec]:
    """The layers of any ``AutoModelForCausalLM``: embedding, decoder layers, head, each marked as a block.

    >>> layers = from_hugging_face("gpt2")                                                      # doctest: +SKIP
    >>> model = DecoupledPipelineModule(layers, config="ds.json", loss_fn=next_token_loss)      # doctest: +SKIP

    Micro-batches are ``(inputs, labels)`` with ``inputs`` token ids ``(N, T)`` or a tuple of these, an attention mask
    ``(N, T)`` and, if wanted, position ids ``(N, T)``; the last layer gives logits ``(N, T, vocab_size)``. Labels are compared
    with the logits of their own place: they must be shifted already, the id that comes next at every place
    (``ids[:, 1:]`` for inputs ``ids[:, :-1]``), unlike those of ``transformers``, which shifts them itself. A layer reads its
    weights when it is built, so that a rank reads its own stages' alone; they are float32 until the engine casts them.

    Args:
        model_or_path: a folder with safetensors, a name on the hub, a model, or a configuration for fresh weights.
        untie_embeddings: where embedding and unembedding are one tensor, make two of it, which start alike. Methods with a
            delayed update need it: a tied pair belongs to two stages that step at different times.
        peft_config: of ``peft``, such as ``LoraConfig``: adapters are added and all else is frozen.
        attn_implementation: as in ``from_pretrained``.

    Raises:
        ConfigError: if the model cannot be cut, naming the part that does not fit, or has no safetensors.
    """
    model_class, config, source_of, generation = _resolve(model_or_path, attn_implementation)
    anatomy = dissect(model_class, config)
    # A frozen pair stays alike by itself.
    frozen = peft_config is not None and not peft_config.modules_to_save
    tie = anatomy.tied and not untie_embeddings and not frozen
    conversion = Conversion(model_class, config, anatomy, source_of(anatomy), untie_embeddings and anatomy.tied, peft_config,
                            generation)
    ends: list[LayerSpec]
    if tie:
        attribute = f"embedding.embedding.{anatomy.input_weight}"
        ends = [TiedLayerSpec(TIED_KEY, TiedEnds, conversion, tied_weight_attr=attribute),
                TiedLayerSpec(TIED_KEY, TiedEnds, conversion, forward_fn=tied_head, tied_weight_attr=attribute)]
    else:
        ends = [LayerSpec(EmbeddingPart, conversion), LayerSpec(HeadPart, conversion)]
    decoder = [LayerSpec(DecoderPart, conversion, index) for index in range(anatomy.count)]
    return [mark_block(layer) for layer in (ends[0], *decoder, ends[1])]


def _resolve(model_or_path: Any, attn_implementation: str | None) -> tuple[Any, Any, Any, str]:
    """Class, configuration, a function from the anatomy to the source of weights, and what the model generates with."""
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    if isinstance(model_or_path, PreTrainedModel):
        if attn_implementation is not None:
            raise ConfigError("attn_implementation", attn_implementation, "a model that is there already has its own",
                              "Give it to from_pretrained(), or pass the folder here.")
        check_quantization(model_or_path.config, type(model_or_path).__name__)
        return type(model_or_path), model_or_path.config, lambda anatomy: InMemory(model_or_path), (
            getattr(model_or_path, "generation_config", None) or GenerationConfig()).to_json_string()
    if isinstance(model_or_path, PreTrainedConfig):
        return _class_of(model_or_path, attn_implementation), model_or_path, lambda anatomy: None, (
            GenerationConfig.from_model_config(model_or_path).to_json_string())
    if not isinstance(model_or_path, (str, Path)):
        raise ConfigError("model", type(model_or_path).__name__, "a folder, a hub name, a model or a configuration is needed")
    folder = _folder(str(model_or_path))
    config = _config(folder)
    check_quantization(config, str(folder))
    both = bool(getattr(config, "is_encoder_decoder", False))  # some classes make it a decoder's when they are made
    model_class = _class_of(config, attn_implementation)

    def source_of(anatomy: Anatomy) -> Source:
        return SafetensorsFolder(folder, skeleton(model_class, config), anatomy, encoder=both)

    said = folder / GENERATION
    generation = said.read_text() if said.is_file() else GenerationConfig.from_model_config(config).to_json_string()
    return model_class, config, source_of, generation


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or name.startswith("."):
        raise ConfigError("model", name, "there is no such folder", "Is the path right?")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except Exception as error:
        raise ConfigError("model", name, "neither a folder, nor a model that can be downloaded "
                          f"({(str(error).splitlines() or [type(error).__name__])[0]})", "Is the name right?") from error


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what a file that is none raises depends on what is in it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("model", str(folder), f"its configuration cannot be read ({reason})",
                          "A folder that save_pretrained() wrote is needed.") from error


def _class_of(config: Any, attn_implementation: str | None) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    except Exception as error:  # what sizes that do not go together raise is the architecture's own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError("model", type(config).__name__, "no causal language model of transformers can be made of it "
                          f"({reason})", "Give a model with a language-modelling head.") from error
    config._attn_implementation = model.config._attn_implementation
    return type(model)
