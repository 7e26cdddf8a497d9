"""What a checkpoint folder says of its tensors, against what the model has: other numbers would be read without a word."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_decoupled.errors import ConfigError
from ds_decoupled.models.hugging_face.anatomy import Anatomy
from ds_decoupled.models.hugging_face.names import Naming

_PLAIN = {"F64", "F32", "F16", "BF16"}
"""Types, as safetensors calls them, whose numbers are what they say."""


def check_quantization(config: Any, place: str) -> None:
    """Raises :class:`ConfigError` for a model whose weights are codes for other numbers."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return
    method = (said if isinstance(said, Mapping) else said.to_dict()).get("quant_method", "unnamed")
    method = getattr(method, "value", method)
    raise ConfigError("model", place, f"its weights are quantized ({method}): codes for numbers, and not the numbers",
                      "Let transformers dequantize it (from_pretrained, dequantize(), save_pretrained), or take the original.")


def check_folder(folder: Path, model: Any, anatomy: Anatomy, naming: Naming,
                 headers: Mapping[str, tuple[tuple[int, ...], str]], *, encoder: bool) -> None:
    """Compare all that the files tell without their tensors.

    Args:
        folder: of the checkpoint.
        model: without weights.
        anatomy: how it is cut.
        naming: what the folder's tensors are in memory.
        headers: shape and type of each, by its name in the files.
        encoder: whether by its configuration the folder holds an encoder and a decoder.

    Raises:
        ConfigError: naming the tensor.
    """
    known = model.state_dict()
    for name, group in naming.groups.items():
        for stored, _ in group.stored:
            shape, kind = headers[stored]
            if known[name].is_floating_point() and kind not in _PLAIN:
                raise ConfigError("model", str(folder), f"its tensor {stored} is of type {kind}: codes, and no plain numbers",
                                  "Take the checkpoint that is not quantized.")
            if group.converter is None and shape != tuple(known[name].shape):
                raise ConfigError("model", str(folder), f"its tensor {stored} is of shape {shape}, and by its configuration of "
                                  f"{tuple(known[name].shape)}", "Give the config.json that was saved with the weights.")
    _check_unread(folder, model, anatomy, naming, encoder)


def _check_unread(folder: Path, model: Any, anatomy: Anatomy, naming: Naming, encoder: bool) -> None:
    """Tensors that the model has no place for: some are left-overs, others say that it is another model."""
    if naming.unread and encoder:
        raise ConfigError("model", str(folder), f"it holds an encoder and a decoder ({next(iter(naming.unread))}), of which "
                          f"{type(model).__name__} is the decoder alone: it would read nothing of what it was trained to read",
                          "It is no chain of layers; take a model that is a decoder by itself.")
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unread = {name: there for name, there in naming.unread.items()
              if not any(re.search(pattern, there) for pattern in ignored)}
    owners = {stored.rpartition(".")[0]: stored for group in naming.groups.values() for stored, _ in group.stored}
    for name, there in unread.items():
        index = there.removeprefix(f"{anatomy.layers}.").partition(".")[0]
        if there.startswith(f"{anatomy.layers}.") and index.isdigit() and int(index) >= anatomy.count:
            raise ConfigError("model", str(folder), f"it has {name}, and by its configuration {anatomy.count} layers",
                              "Give the config.json that was saved with the weights.")
        if owner := owners.get(name.rpartition(".")[0]):
            raise ConfigError("model", str(folder), f"it has {name} beside {owner}, which {type(model).__name__} has no place "
                              "for: without it the layer is another one", "Is its config.json the one that it was saved with?")
