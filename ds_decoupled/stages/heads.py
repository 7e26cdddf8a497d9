"""Building the heads of stage-local losses: from the shape of what each stage gives."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from ds_decoupled.collectives import gather, together
from ds_decoupled.compat import layer_specs
from ds_decoupled.errors import ConfigError
from ds_decoupled.nn.heads import (
    LAST_LAYER,
    HeadBuilder,
    SharedReadout,
    StageHead,
    build_head,
    copied_layers,
    shared_blocks,
)
from ds_decoupled.schedules import Ticks
from ds_decoupled.stages.local import LocalStage
from ds_decoupled.stages.randomness import mix, seeded
from ds_decoupled.stages.stage import Stage
from ds_decoupled.tensors import Tensors, as_tuple, map_tensors

if TYPE_CHECKING:
    from ds_decoupled.engine import DecoupledPipelineEngine

Description = tuple[tuple[torch.Size, torch.dtype], ...]
"""Shapes and types of what a stage gives; what else is in it does not matter here."""


def samples_of(module: Any, input_shape: Sequence[int] | None, micro_batch: int, dtype: torch.dtype) -> list[Tensors]:
    """Inputs of the first layer, to be tried in this order: the module's own sample, or those of the shape that the JSON gives.

    The shape does not say the type. Token ids come first where samples have one dimension, numbers elsewhere; then the other.

    Args:
        module: the pipeline module.
        input_shape: of one sample.
        micro_batch: samples in a micro-batch.
        dtype: the layers' floating-point type.

    Raises:
        ConfigError: where there is neither.
    """
    sample: Tensors | None = getattr(module, "sample_input", None)
    if sample is not None:
        return [sample]
    if input_shape is None:
        raise ConfigError("decoupled.input_shape", None, "heads are built from the shapes of what stages give, and no input is "
                          "known", 'Give one sample\'s shape, such as [3, 32, 32] (or [128] for 128 token ids or features), or '
                          "DecoupledPipelineModule a sample_input.")
    numbers = list(dict.fromkeys((torch.float32, dtype)))
    order = [torch.long, *numbers] if len(input_shape) == 1 else [*numbers, torch.long]
    return [torch.zeros(micro_batch, *input_shape, dtype=kind) for kind in order]


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
        with stage.buffers.held():
            x = stage.plain_forward(0, x)
        for m, mode in zip(modules, training):
            m.training = mode
        found.append(map_tensors(torch.clone, x))
    return found


def make_head(name: str | HeadBuilder | None, outputs: Tensors, count: int, seed: int, stage: int,
              like: nn.Parameter | None, device: torch.device, layers: Sequence[Any],
              readout: SharedReadout | None = None) -> StageHead:
    """The head of one stage, the same wherever the stage is placed.

    Args:
        name: as in :func:`ds_decoupled.nn.build_head`; None chooses by the shape.
        outputs: what the stage gives.
        count: outputs of the head.
        seed, stage: of its initial weights.
        like: a parameter whose type it takes.
        device: where it lives.
        layers: of the whole model, as they were given to the pipeline module.
        readout: this rank's, for a shared head (by default one of its own).

    Raises:
        ConfigError: if there is no such head, it cannot be built from the shape, or does not run on what the stage gives.
    """
    chosen = name if name is not None else {2: "mlp", 3: "lm"}.get(as_tuple(outputs)[0].dim(), "mlp-sr")
    copied, blocks = copied_layers(chosen), shared_blocks(chosen)
    with seeded(mix(seed, 0x68656164, stage)):  # "head"
        if blocks is not None:
            own = [_copy_of(layer) for layer in _last(layers, blocks + 1, chosen)[:-1]]
            head = StageHead(nn.Sequential(*own, readout or make_readout(layers, like, device)), takes_all=True)
        elif copied:
            copies = [_copy_of(layer) for layer in _last(layers, copied, chosen)]
            head = StageHead(nn.Sequential(*copies) if copied > 1 else copies[0], takes_all=True)
        else:
            head = build_head(chosen, outputs, count)
    for parameter in head.parameters():
        parameter.use_muon = False  # type: ignore[attr-defined]  # DeepSpeed's Muon asks every parameter
    _place(head, like, device)
    try:
        with torch.no_grad(), seeded(mix(seed, 0x68656164, stage)):  # lazy layers get their weights here
            head.eval()(outputs)
    except Exception as error:
        raise ConfigError("decoupled.head", str(chosen), f"it does not run on what stage {stage} gives: "
                          f"{[tuple(t.shape) for t in as_tuple(outputs)]} ({type(error).__name__}: {error})",
                          "Take another head, or cut the stages elsewhere.") from error
    return head.train()


def make_readout(layers: Sequence[Any], like: nn.Parameter | None, device: torch.device) -> SharedReadout:
    """A read-only copy of the last of ``layers``, with the weights that this starts from."""
    readout = SharedReadout(_copy_of(layers[-1]))
    _place(readout, like, device)
    return readout


def _place(module: nn.Module, like: nn.Parameter | None, device: torch.device) -> None:
    module.to(device=device, dtype=like.dtype if like is not None and like.dtype.is_floating_point else None)


def _last(layers: Sequence[Any], count: int, name: Any) -> Sequence[Any]:
    if count > len(layers):
        raise ConfigError("decoupled.head", name, f"it copies {count} layers of the model, which has {len(layers)}")
    return layers[-count:]


def _copy_of(layer: Any) -> nn.Module:
    if isinstance(layer, LayerSpec) and not isinstance(layer, TiedLayerSpec):
        built: nn.Module = layer.build()
        return built
    if isinstance(layer, nn.Module) and next(layer.parameters(), None) is not None:
        return copy.deepcopy(layer)
    raise ConfigError("decoupled.head", LAST_LAYER, f"{layer!r:.60}, among the model's last layers, has no weights of its own",
                      "Untie it, or take another head.")


def build_heads(engine: DecoupledPipelineEngine) -> SharedReadout | None:
    """Give this rank's stages their heads: a blank sample passes through all stages, rank by rank. A collective call.

    Returns:
        The copy of the last layer that the rank's heads share, if they do.

    Raises:
        ConfigError: on every rank, if any head cannot be built.
    """
    module, config, placement, stages = engine.module, engine.decoupled, engine.placement, engine.stages
    window, last = config.axes().window, placement.stages - 1
    first_loss = Ticks.local(placement.stages, (0, 1), window, config.losses == "farthest").first_loss
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    complaints: list[str] = []
    for sample in samples_of(module, config.input_shape, engine.train_micro_batch_size_per_gpu(), dtype):
        here, passed = _pass_through(engine, sample)
        if not isinstance(passed, str):
            break
        complaints.append(passed)
    else:
        raise ConfigError("decoupled.input_shape", config.input_shape, "; ".join(complaints), "Is it the shape of one of its "
                          "inputs? Where it does not say enough, give DecoupledPipelineModule a sample_input.")
    outputs = passed[0][0][0][-1]
    like = next((p for stage in stages.values() for p in stage.parameters if p.is_floating_point()), None)

    def make() -> SharedReadout | None:
        shares = shared_blocks(config.head) is not None
        readout = make_readout(layer_specs(module), like, engine.device) if shares else None
        for (index, stage), given in zip(stages.items(), here):
            if isinstance(stage, LocalStage) and first_loss <= index < last:
                with stage.autocast.forward():
                    stage.head = make_head(config.head, given, outputs, engine.seeds.base, index, like, engine.device,
                                           layer_specs(module), readout)
        return readout

    readout = together(make)
    _give_losses(engine)
    return readout


def _pass_through(engine: DecoupledPipelineEngine, sample: Tensors) -> tuple[list[Tensors], Any]:
    """Pass a blank ``sample`` through all stages, rank by rank. A collective call.

    Returns:
        What each stage here gives, and the last stage's shapes and types; or what went wrong on any rank, in words.
    """
    placement, stages = engine.placement, engine.stages
    passed: Any = describe(sample), isinstance(sample, Tensor)
    here: list[Tensors] = []
    for turn in range(placement.ranks):
        given: Any = None
        if turn == placement.rank_of_stage[min(stages)]:
            description, single = passed
            try:
                here = outputs_of(stages.values(), blank(description, single, engine.device))
                given = describe(here[-1]), isinstance(here[-1], Tensor)
            except Exception as error:
                kinds = [f"{str(dtype).removeprefix('torch.')} {tuple(shape)}" for shape, dtype in description]
                given = f"a blank sample, {', '.join(kinds)}, does not pass: {error}"
        passed = next(value for value in gather(given) if value is not None)
        if isinstance(passed, str):
            break
    return here, passed


def _give_losses(engine: DecoupledPipelineEngine) -> None:
    """A loss with parameters or buffers of its own: every stage with a head gets a copy of the last stage's."""
    loss_fn = engine.module.loss_fn
    if not isinstance(loss_fn, nn.Module) or not loss_fn.state_dict():
        return
    last = engine.placement.stages - 1
    # Each rank made its own; the last stage's is the one that counts.
    told = gather(loss_fn.state_dict() if last in engine.stages else None)
    state = next(value for value in told if value is not None)
    for stage in engine.stages.values():
        if isinstance(stage, LocalStage) and stage.head is not None:
            stage.give_loss(state)


def refresh(engine: DecoupledPipelineEngine, readout: SharedReadout) -> int:
    """Bring the ranks' copies of the last layer up to date; a collective call of a pipeline's ranks.

    Returns:
        Bytes that this rank sent.
    """
    placement = engine.placement
    source = engine.module.forward_funcs[-1] if engine.holds_loss else None
    group, sent = engine.grid.get_pipe_parallel_group(), 0
    for name, value in sorted(readout.layer.state_dict().items()):
        if source is not None:
            value.copy_(source.state_dict()[name])
        if placement.ranks > 1:
            dist.broadcast(value, engine.grid.stage_to_global(placement.ranks - 1), group=group)
            sent += value.nbytes * (placement.ranks - 1) if source is not None else 0
    return sent


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
