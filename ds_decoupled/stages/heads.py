"""Building the heads of stage-local losses: from the shape of what each stage gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ds_decoupled.errors import ConfigError
from ds_decoupled.nn.heads import HeadBuilder, StageHead, build_head
from ds_decoupled.stages.batch_norm import frozen_statistics
from ds_decoupled.stages.randomness import mix, seeded
from ds_decoupled.stages.stage import Stage
from ds_decoupled.tensors import Tensors, as_tuple, map_tensors

Description = tuple[tuple[torch.Size, torch.dtype], ...]
"""Shapes and types of what a stage gives; what else is in it does not matter here."""


def sample_of(module: Any, input_shape: Sequence[int] | None, micro_batch: int) -> Tensors:
    """An input of the first layer: the module's own sample, or one of the shape that the JSON gives.

    Raises:
        ConfigError: where there is neither.
    """
    sample: Tensors | None = getattr(module, "sample_input", None)
    if sample is not None:
        return sample
    if input_shape is None:
        raise ConfigError("decoupled.input_shape", None, "heads are built from the shapes of what stages give, and no input is "
                          "known", 'Give one sample\'s shape, such as [3, 32, 32] (or [128] for 128 token ids), or '
                          "DecoupledPipelineModule a sample_input.")
    return torch.zeros(micro_batch, *input_shape, dtype=torch.float32 if len(input_shape) > 1 else torch.long)


def describe(value: Tensors) -> Description:
    """Shapes and types of ``value``."""
    return tuple((t.shape, t.dtype) for t in as_tuple(value))


def blank(description: Description, single: bool, device: torch.device) -> Tensors:
    """Zeros of that description."""
    tensors = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in description)
    return tensors[0] if single else tensors


@torch.no_grad()
def outputs_of(stages: Iterable[Stage], inputs: Tensors) -> list[Tensors]:
    """What each of consecutive stages gives for ``inputs``; nothing about them changes."""
    found = []
    x = inputs
    for stage in stages:
        modules = [m for layer in stage.layers for m in (layer.modules() if isinstance(layer, nn.Module) else ())]
        training = [m.training for m in modules]
        for m in modules:
            m.training = False
        with frozen_statistics(stage.norms):
            x = stage.plain_forward(0, x)
        for m, mode in zip(modules, training):
            m.training = mode
        found.append(map_tensors(torch.clone, x))
    return found


def make_head(name: str | HeadBuilder | None, outputs: Tensors, count: int, seed: int, stage: int,
              like: nn.Parameter | None, device: torch.device) -> StageHead:
    """The head of one stage, the same wherever the stage is placed.

    Args:
        name: as in :func:`ds_decoupled.nn.build_head`; None chooses by the shape.
        outputs: what the stage gives.
        count: outputs of the head.
        seed, stage: of its initial weights.
        like: a parameter whose type it takes.
        device: where it lives.
    """
    chosen = name if name is not None else "lm" if as_tuple(outputs)[0].dim() == 3 else "mlp-sr"
    with seeded(mix(seed, 0x68656164, stage)):  # "head"
        head = build_head(chosen, outputs, count)
    for parameter in head.parameters():
        parameter.use_muon = False  # type: ignore[attr-defined]  # DeepSpeed's Muon asks every parameter
    return head.to(device=device, dtype=like.dtype if like is not None and like.dtype.is_floating_point else None)


def groups_with_heads(own: Sequence[Any], head: Sequence[nn.Parameter]) -> list[Any]:
    """A stage's parameters (or groups) for its optimizer, with the head's: where there are groups, a head's biases and norms
    do not decay."""
    if not head:
        return list(own)
    if not any(isinstance(item, Mapping) for item in own) and own:
        return [*own, *head]
    flat = [p for p in head if p.ndim <= 1]
    grown = [p for p in head if p.ndim > 1]
    return [*own, *([{"params": grown}] if grown else []), *([{"params": flat, "weight_decay": 0.0}] if flat else [])]
