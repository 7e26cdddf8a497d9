"""Making one head of a stage-local loss, from the shape of what the stage gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

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
from ds_decoupled.stages.randomness import mix, seeded
from ds_decoupled.tensors import Tensors, as_tuple


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
