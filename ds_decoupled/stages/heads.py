"""Making one head of a stage-local loss, from the shape of what the stage gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

from ds_decoupled.errors import ConfigError
from ds_decoupled.nn.auglocal import AUGLOCAL, auglocal_depth, depth_of, picked
from ds_decoupled.nn.heads import (
    LAST_LAYER,
    SHARED,
    HeadBuilder,
    SharedReadout,
    StageHead,
    build_head,
    copied_layers,
    shared_blocks,
)
from ds_decoupled.nn.lens import LENS, Translator, lens_blocks, lens_depth
from ds_decoupled.stages.compiled import plain_copy
from ds_decoupled.stages.randomness import mix, seeded
from ds_decoupled.tensors import Form, Tensors, as_tuple


@dataclass(frozen=True)
class WholeModel:
    """What heads that are made of the model's own layers are made from; every rank knows it.

    Attributes:
        layers: as they were given to the pipeline module.
        bounds: at which of them stages begin, and their number.
        forms: what each layer gives, where a sample has passed.
    """

    layers: Sequence[Any]
    bounds: Sequence[int]
    forms: Sequence[Form] = ()


def make_head(name: str | HeadBuilder | None, outputs: Tensors, count: int, seed: int, stage: int,
              like: nn.Parameter | None, device: torch.device, model: WholeModel,
              readout: SharedReadout | None = None) -> StageHead:
    """The head of one stage, the same wherever the stage is placed.

    Args:
        name: as in :func:`ds_decoupled.nn.build_head`; None chooses by the shape.
        outputs: what the stage gives.
        count: outputs of the head.
        seed, stage: of its initial weights.
        like: a parameter whose type it takes.
        device: where it lives.
        model: the whole of it.
        readout: this rank's, for heads that end in a read-only one (by default one of its own).

    Raises:
        ConfigError: if there is no such head, it cannot be built from the shape, or does not run on what the stage gives.
    """
    chosen = name if name is not None else {2: "mlp", 3: "lm"}.get(as_tuple(outputs)[0].dim(), "mlp-sr")
    own = own_layers(chosen, stage, len(model.bounds) - 1, len(model.layers) - 1 - model.bounds[stage + 1])
    with seeded(mix(seed, 0x68656164, stage)):  # "head"
        if own is None:
            head = build_head(chosen, outputs, count)
        else:
            layers: list[nn.Module] = [Translator(outputs)] if own.kind == LENS else []
            if own.kind in (LENS, AUGLOCAL):
                layers += _picked_layers(model, stage, own.count, own.kind)
            else:
                layers += [_copy_of(layer, chosen) for layer in _last(model.layers, own.count + 1, chosen)[:-1]]
            if own.ends_in_readout:
                layers.append(readout or make_readout(model.layers, like, device))
            else:
                layers.append(_copy_of(model.layers[-1], chosen))
            # One copy by itself is no sequence, and its weights are named so in checkpoints.
            alone = own == OwnLayers(LAST_LAYER, 0)
            head = StageHead(layers[0] if alone else nn.Sequential(*layers), takes_all=True)
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


@dataclass(frozen=True)
class OwnLayers:
    """What a head has of the model's own layers, beside the last one.

    Attributes:
        kind: :data:`LAST_LAYER`, :data:`SHARED`, :data:`AUGLOCAL` or :data:`LENS`.
        count: of them.
    """

    kind: str
    count: int

    @property
    def ends_in_readout(self) -> bool:
        """Whether the last layer is read-only in it, and one for all heads of a rank."""
        return self.kind in (SHARED, LENS)


def own_layers(name: str | HeadBuilder | None, stage: int, stages: int, above: int) -> OwnLayers | None:
    """What the head of a stage has of the model's own layers; None for one that has none of them, and is small.

    Args:
        name: as for :func:`make_head`.
        stage: its number.
        stages: J.
        above: layers between the stage and the model's last one.
    """
    if copied := copied_layers(name or ""):
        return OwnLayers(LAST_LAYER, copied - 1)
    if (blocks := shared_blocks(name)) is not None:
        return OwnLayers(SHARED, blocks)
    if (depth := auglocal_depth(name)) is not None:
        return OwnLayers(AUGLOCAL, depth_of(stage, stages, depth))
    if (lens := lens_depth(name)) is not None:
        return OwnLayers(LENS, lens_blocks(lens, above))
    return None


def make_readout(layers: Sequence[Any], like: nn.Parameter | None, device: torch.device) -> SharedReadout:
    """A read-only copy of the last of ``layers``, with the weights that this starts from."""
    readout = SharedReadout(_copy_of(layers[-1], SHARED))
    _place(readout, like, device)
    return readout


def _place(module: nn.Module, like: nn.Parameter | None, device: torch.device) -> None:
    module.to(device=device, dtype=like.dtype if like is not None and like.dtype.is_floating_point else None)


def _last(layers: Sequence[Any], count: int, name: Any) -> Sequence[Any]:
    if count > len(layers):
        raise ConfigError("decoupled.head", name, f"it copies {count} layers of the model, which has {len(layers)}")
    return layers[-count:]


def _picked_layers(model: WholeModel, stage: int, depth: int, name: str) -> list[nn.Module]:
    """Copies of so many layers below the model's last one, those that AugLocal's rule picks for ``stage``."""
    if not depth:
        return []
    body = model.layers[:-1]
    changes = [before != after for before, after in zip((None, *model.forms), model.forms[:-1])]
    which = picked([_kind(layer) for layer in body], changes, model.bounds[stage + 1], depth)
    return [_between(body[index], name) for index in which]


def _kind(layer: Any) -> object:
    """What is the same for two layers that do the same work, of whatever size."""
    if isinstance(layer, LayerSpec):
        return (layer.typename, *(argument for argument in layer.module_args if isinstance(argument, type)))
    return type(layer) if isinstance(layer, nn.Module) else layer


class _Function(nn.Module):
    """A layer that is a function."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def _between(layer: Any, name: str) -> nn.Module:
    """A copy of a layer that need not have weights."""
    if isinstance(layer, LayerSpec):
        return _copy_of(layer, name)
    return plain_copy(layer) if isinstance(layer, nn.Module) else _Function(layer)


def _copy_of(layer: Any, name: Any) -> nn.Module:
    if isinstance(layer, LayerSpec) and not isinstance(layer, TiedLayerSpec):
        built: nn.Module = layer.build()
        return built
    if isinstance(layer, nn.Module) and next(layer.parameters(), None) is not None:
        return plain_copy(layer)
    raise ConfigError("decoupled.head", name, f"{layer!r:.60}, among the layers that it copies, has no weights of its own",
                      "Untie it, or take another head.")
