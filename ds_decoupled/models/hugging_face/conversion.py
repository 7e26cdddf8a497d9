"""How one model is cut: what its layers share, and how a part gets its weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_decoupled.errors import ConfigError
from ds_decoupled.models.hugging_face.adapters import add_adapters
from ds_decoupled.models.hugging_face.anatomy import Anatomy, skeleton
from ds_decoupled.models.hugging_face.weights import Source


@dataclass(frozen=True, eq=False)
class Conversion:
    """A model that is being cut into layers.

    Attributes:
        model_class: its class in ``transformers``.
        config: its configuration.
        anatomy: where its parts are.
        source: where its weights come from; None for fresh ones.
        untied: whether embedding and unembedding, one tensor in the original, are two here.
        peft_config: adapters to add; everything else is then frozen.
        generation: its ``generation_config.json``.
    """

    model_class: Any
    config: Any
    anatomy: Anatomy
    source: Source | None
    untied: bool = False
    peft_config: Any = None
    generation: str = "{}"

    @property
    def source_dtype(self) -> torch.dtype:
        """The type of the checkpoint that was read, as its configuration has it."""
        said = getattr(self.config, "dtype", None) or torch.float32
        return getattr(torch, said) if isinstance(said, str) else said

    @property
    def model(self) -> tuple[Any, Any, Anatomy]:
        """Class, configuration, anatomy."""
        return self.model_class, self.config, self.anatomy

    def fill(self, root: nn.Module) -> None:
        """Give the weights under ``root`` memory and values, float32, and add adapters.

        Within ``torch.device("meta")`` they get neither: there, layers are built to be counted.
        """
        if torch.get_default_device().type != "meta":
            names = list(root.state_dict())
            values = self.source.read(names) if self.source is not None else {}
            for name, tensor in root.state_dict().items():
                if name in values and values[name].shape != tensor.shape:
                    raise ConfigError("model", type(self.config).__name__, f"the checkpoint's tensor {name} is of shape "
                                      f"{tuple(values[name].shape)}, and by its configuration of {tuple(tensor.shape)}",
                                      "Give the config.json that was saved with the weights.")
            for name, parameter in list(root.named_parameters()):
                path, _, own = name.rpartition(".")
                value = values[name].float().clone() if name in values else torch.empty_like(parameter, device="cpu")
                setattr(root.get_submodule(path), own, nn.Parameter(value))
            self._tie_inside(root)
            for name, buffer in root.named_buffers():
                if name in values:
                    buffer.copy_(values[name])
            if self.source is None:
                root.apply(skeleton(self.model_class, self.config)._init_weights)
        if self.peft_config is not None:
            add_adapters(root, self.peft_config, self.config)

    def tied_inside(self, names: Collection[str]) -> dict[str, str]:
        """Of the weights ``names`` of one part: those that are another one of them, by which."""
        pairs = getattr(skeleton(self.model_class, self.config), "all_tied_weights_keys", {})
        return {one: other for one, other in pairs.items() if one in names and other in names}

    def _tie_inside(self, root: nn.Module) -> None:
        for name, other in self.tied_inside(dict(root.named_parameters(remove_duplicate=False))).items():
            path, _, own = name.rpartition(".")
            setattr(root.get_submodule(path), own, root.get_parameter(other))
