"""A method is a point on five axes; a preset names one.

>>> resolve("petra", {"weights": "predicted"}, hops=(0, 1))
Axes(gradient='global', recover='reconstruct', weights='predicted', update='delayed', input='stream', hops=(0, 1), window=0)

Which points there are is :mod:`ds_decoupled.settings.belongs`'s business. No torch, no pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

Gradient = Literal["global", "local", "auxiliary"]
Recover = Literal["graph", "input", "reconstruct"]
Weights = Literal["current", "stashed", "predicted"]
Update = Literal["flush", "delayed", "layerwise"]
Input = Literal["stream", "replay", "auxnet"]
Pace = Literal["ticks", "clock", "free"]
Kappa = Literal["zero", "kept", "predicted"]

AXES: dict[str, tuple[str, ...]] = {
    "gradient": get_args(Gradient),
    "recover": get_args(Recover),
    "weights": get_args(Weights),
    "update": get_args(Update),
    "input": get_args(Input),
}


@dataclass(frozen=True)
class Axes:
    """One method: where gradients come from, what the backward pass finds, and when a stage steps (design: the axes).

    ``hops = (a, b)``: ticks that a message takes from stage to stage, forward and backward. ``window``: stages whose losses
    reach a stage, its own among them; 0 with a global gradient. ``pace``: where the order of actions comes from
    (:data:`ds_decoupled.runners.RUNNERS`). ``kappa``: with generated inputs, where their multipliers come from
    (:mod:`ds_decoupled.stages.auxiliary`); "zero" elsewhere.
    """

    gradient: Gradient
    recover: Recover
    weights: Weights
    update: Update
    input: Input
    hops: tuple[int, int]
    window: int = 0
    pace: Pace = field(default="ticks", repr=False)
    kappa: Kappa = field(default="zero", repr=False)

    @property
    def flush(self) -> bool:
        return self.update == "flush"

    @property
    def layerwise(self) -> bool:
        """Forward and backward passes have threads of their own, and a stage steps when its gradient exists (PD-ASGD)."""
        return self.update == "layerwise"

    @property
    def unplanned(self) -> bool:
        """Who acts next does not follow from a plan of ticks."""
        return self.input == "replay" or self.layerwise

    @property
    def plain(self) -> bool:
        """Nothing to decouple: 1F1B with a flush, which DeepSpeed's own engine runs."""
        return self == PRESETS["backprop"]


#: Under ``flush`` no message waits for a tick boundary that it need not wait for: one tick back between ranks is 1F1B.
FLUSH_HOPS = (0, 1)

PRESETS: dict[str, Axes] = {
    "backprop": Axes("global", "graph", "current", "flush", "stream", FLUSH_HOPS),
    "reversible": Axes("global", "reconstruct", "current", "flush", "stream", FLUSH_HOPS),
    "pipedream": Axes("global", "graph", "stashed", "delayed", "stream", (0, 1)),
    "delayed": Axes("global", "graph", "current", "delayed", "stream", (0, 1)),
    "dsp": Axes("global", "input", "current", "delayed", "stream", (1, 1)),
    "petra": Axes("global", "reconstruct", "current", "delayed", "stream", (1, 1)),
    "dgl": Axes("local", "graph", "current", "delayed", "stream", (0, 1), window=1),
    "overlapping": Axes("local", "graph", "current", "delayed", "stream", (0, 1), window=2),
    "dgl_async": Axes("local", "graph", "current", "delayed", "replay", (0, 1), window=1, pace="free"),
    "pd_asgd": Axes("global", "graph", "current", "layerwise", "stream", (0, 1), pace="free"),
    "hogwild": Axes("global", "graph", "current", "layerwise", "stream", (0, 1), pace="free"),
    "lapsgd": Axes("global", "graph", "current", "layerwise", "stream", (0, 1), pace="free"),
    "auxnet_penalty": Axes("auxiliary", "graph", "current", "delayed", "auxnet", (0, 1)),
    "auxnet_lagrangian": Axes("auxiliary", "graph", "current", "delayed", "auxnet", (0, 1), kappa="predicted"),
}


def resolve(method: str, chosen: Mapping[str, Any], hops: tuple[int, int] | None = None, window: int | None = None,
            pace: Pace | None = None, kappa: Kappa | None = None) -> Axes:
    """The preset ``method`` with a user's overrides.

    Args:
        method: a key of :data:`PRESETS`.
        chosen: values by axis; None leaves the preset's.
        hops: None leaves the preset's, or takes those of a flush.
        window: with local gradients; None leaves the preset's, or takes 1 where it has none.
        pace: None takes the one that goes with input and update: stages with a replay ring run free, and so do the threads of
            a layer-wise update; others go by ticks.
        kappa: with generated inputs; None leaves the preset's.
    """
    axes = replace(PRESETS[method], **{name: value for name, value in chosen.items() if value is not None})
    if hops is not None or axes.flush:
        axes = replace(axes, hops=hops or FLUSH_HOPS)
    axes = replace(axes, pace=pace or ("free" if axes.unplanned else "ticks"))
    if axes.input == "auxnet":
        axes = replace(axes, kappa=kappa or axes.kappa)
    else:
        axes = replace(axes, kappa="zero")
    if axes.gradient != "local":
        return replace(axes, window=0)
    return replace(axes, window=window or axes.window or 1)
