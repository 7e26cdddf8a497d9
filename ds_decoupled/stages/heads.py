"""Building the heads of stage-local losses: from the shape of what each stage gives."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from ds_decoupled.compat import gather_objects, layer_specs
from ds_decoupled.config import DecoupledConfig
from ds_decoupled.errors import ConfigError
from ds_decoupled.nn.heads import LAST_LAYER, HeadBuilder, StageHead, build_head
from ds_decoupled.schedules import Placement, Ticks
from ds_decoupled.stages.batch_norm import frozen_statistics
from ds_decoupled.stages.local import LocalStage
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
              like: nn.Parameter | None, device: torch.device, last_layer: Any) -> StageHead:
    """The head of one stage, the same wherever the stage is placed.

    Args:
        name: as in :func:`ds_decoupled.nn.build_head`; None chooses by the shape.
        outputs: what the stage gives.
        count: outputs of the head.
        seed, stage: of its initial weights.
        like: a parameter whose type it takes.
        device: where it lives.
        last_layer: of the whole model, as it was given to the pipeline module.

    Raises:
        ConfigError: if there is no such head, it cannot be built from the shape, or does not run on what the stage gives.
    """
    chosen = name if name is not None else "lm" if as_tuple(outputs)[0].dim() == 3 else "mlp-sr"
    with seeded(mix(seed, 0x68656164, stage)):  # "head"
        if chosen == LAST_LAYER:
            head = StageHead(_copy_of(last_layer), takes_all=True)
        else:
            head = build_head(chosen, outputs, count)
    for parameter in head.parameters():
        parameter.use_muon = False  # type: ignore[attr-defined]  # DeepSpeed's Muon asks every parameter
    head.to(device=device, dtype=like.dtype if like is not None and like.dtype.is_floating_point else None)
    try:
        with torch.no_grad():
            head.eval()(outputs)
    except Exception as error:
        raise ConfigError("decoupled.head", str(chosen), f"it does not run on what stage {stage} gives: "
                          f"{[tuple(t.shape) for t in as_tuple(outputs)]} ({type(error).__name__}: {error})",
                          "Take another head, or cut the stages elsewhere.") from error
    return head.train()


def _copy_of(layer: Any) -> nn.Module:
    if isinstance(layer, LayerSpec) and not isinstance(layer, TiedLayerSpec):
        built: nn.Module = layer.build()
        return built
    if isinstance(layer, nn.Module) and next(layer.parameters(), None) is not None:
        return copy.deepcopy(layer)
    raise ConfigError("decoupled.head", LAST_LAYER, f"the model's last layer, {layer!r:.60}, has no weights of its own",
                      "Untie it, or take another head.")


def build_heads(stages: Mapping[int, Stage], module: Any, config: DecoupledConfig, placement: Placement, rank: int,
                micro_batch: int, device: torch.device) -> None:
    """Give this rank's stages their heads: a blank sample passes through all stages, rank by rank. A collective call.

    Raises:
        ConfigError: on every rank, if any head cannot be built.
    """
    window, last = config.axes().window, placement.stages - 1
    first_loss = Ticks.local(placement.stages, (0, 1), window, config.losses == "farthest").first_loss
    sample = sample_of(module, config.input_shape, micro_batch)
    passed = describe(sample), isinstance(sample, Tensor)
    here: list[Tensors] = []
    for turn in range(placement.ranks):
        given: Any = None
        if turn == rank:
            description, single = passed
            try:
                here = outputs_of(stages.values(), blank(description, single, device))
                given = describe(here[-1]), isinstance(here[-1], Tensor)
            except Exception as error:
                given = f"a blank sample of shape {[tuple(shape) for shape, _ in description]} does not pass: {error}"
        passed = next(value for value in gather_objects(given) if value is not None)
        if isinstance(passed, str):
            raise ConfigError("decoupled.input_shape", config.input_shape, passed, "Is it the shape of one of its inputs?")
    outputs = passed[0][0][0][-1]
    failure: ConfigError | None = None
    try:
        for (index, stage), given in zip(stages.items(), here):
            if isinstance(stage, LocalStage) and first_loss <= index < last:
                like = next((p for p in stage.parameters if p.is_floating_point()), None)
                stage.head = make_head(config.head, given, outputs, getattr(module, "base_seed", 0), index, like, device,
                                       layer_specs(module)[-1])
    except ConfigError as error:
        failure = error
    first = next((fields for fields in gather_objects(failure and failure.fields) if fields), None)
    if first is not None:
        raise ConfigError(*first)


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
