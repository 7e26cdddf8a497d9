"""The ``decoupled`` block of a DeepSpeed JSON file: a method is a point on five axes.

>>> parse_block({"decoupled": {"method": "petra"}}).axes()
Axes(gradient='global', recover='reconstruct', weights='current', update='delayed', input='stream', hops=(1, 1))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_decoupled.errors import ConfigError
from ds_decoupled.settings import check_choice, read_json
from ds_decoupled.settings.reading import Source
from ds_decoupled.settings.table import BLOCK

Gradient = Literal["global", "local"]
Recover = Literal["graph", "input", "reconstruct"]
Weights = Literal["current", "stashed", "predicted"]
Update = Literal["flush", "delayed"]
Input = Literal["stream"]
Codec = Literal["none", "bf16"]

#: Bounds of what makes sense. A stage keeps up to ``(a+b)(J-1)+1`` micro-batches, and needs a layer of its own.
MOST_HOPS = 1_000
MOST_STAGES = 10_000
MOST_QUEUE = 100_000
MOST_NUMBERS = 2**31  # of one sample
YEAR = 31_536_000  # seconds


@dataclass(frozen=True)
class Axes:
    """One method: where gradients come from, what the backward pass finds, and when a stage steps (design: the axes).

    ``hops = (a, b)``: ticks that a message takes from stage to stage, forward and backward. ``window``: stages whose losses
    reach a stage, its own among them; 0 with a global gradient.
    """

    gradient: Gradient
    recover: Recover
    weights: Weights
    update: Update
    input: Input
    hops: tuple[int, int]
    window: int = 0

    @property
    def flush(self) -> bool:
        return self.update == "flush"


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
}

AXES: dict[str, tuple[str, ...]] = {
    "gradient": get_args(Gradient),
    "recover": get_args(Recover),
    "weights": get_args(Weights),
    "update": get_args(Update),
    "input": get_args(Input),
}


@dataclass(frozen=True)
class CompileSettings:
    """How layers are compiled, see :mod:`ds_decoupled.stages.compiled`.

    Attributes:
        backend: ``inductor``, or ``aot_eager``, which writes no code: it shows whose fault a number is.
        mode: inductor's.
        dynamic: whether shapes may change without compiling again; None: from the first change on.
    """

    backend: str = "inductor"
    mode: str = "default"
    dynamic: bool | None = None


BACKENDS = ("inductor", "aot_eager")
MODES = ("default", "max-autotune-no-cudagraphs")


class DecoupledConfig(BaseModel):
    """The ``decoupled`` block.

    Attributes:
        method: a preset's name.
        stages: J: a number, ``"ranks"`` (one per rank), ``"blocks"`` (one per block that the model marks), or the
            layer indices at which stages begin and the last one ends.
        partition: how layers are spread over stages and stages over ranks: ``"parameters"``, ``"uniform"``,
            ``"profile"`` (measured time), or the layer indices at which ranks begin and the last one ends.
        hops: ticks that a message takes from stage to stage, forward and backward.
        gradient, recover, weights, update, input: override one axis of the preset.
        window: with local gradients: stages whose losses reach a stage, its own among them. 1 is greedy, 2 overlapping.
        losses: which of the window's losses a stage learns from: their ``"sum"`` or the ``"farthest"`` alone.
        head: what a stage's own loss is taken from: a name of :data:`ds_decoupled.nn.HEADS`, copies of the model's own last
            layers, or ``"module:callable"`` (:mod:`ds_decoupled.nn.heads`); by default ``"lm"`` where stages give
            ``(N, T, width)``, ``"mlp"`` where ``(N, features)``, else ``"mlp-sr"``.
        head_refresh: updates after which a shared head is brought up to date.
        ensemble: whether evaluation asks all heads, and takes the mean of their probabilities.
        input_shape: of one sample, so that heads can be built where the module has no ``sample_input``. Token ids are
            tried first where it has one dimension, numbers elsewhere; then the other.
        queue: micro-batches that a stage may run ahead of the next where nothing comes back from it.
        stage_lr: the learning rate of each stage, as a factor (one per stage).
        stage_schedulers: the LR scheduler of each stage, as DeepSpeed's ``scheduler`` block; null is for the JSON's own.
        stop_after: updates after which each stage stops learning (one per stage; null: never). It goes on forwarding in
            evaluation mode.
        codec: how floating-point payloads travel between ranks.
        split_backward: send a gradient down before the weights' own gradients are computed.
        compile: ``torch.compile`` the layers: true, or an object of :class:`CompileSettings`' attributes.
        lr_by_delay: updates over which the damping of late stages' learning rates fades (PipeMare's T1,
            :mod:`ds_decoupled.optim.lr_by_delay`); 0 is no damping.
        track_gradients: compare the gradient used with the exact one every so many micro-batches; 0 is never.
        timeout: seconds that a rank waits for a message before it gives up.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    method: str
    stages: int | str | list[int] = "ranks"
    partition: str | list[int] = "parameters"
    hops: list[int] | tuple[int, int] | None = None
    gradient: str | None = None
    recover: str | None = None
    weights: str | None = None
    update: str | None = None
    input: str | None = None
    window: int | None = None
    losses: str = "sum"
    head: str | None = None
    head_refresh: int = 50
    ensemble: bool = False
    input_shape: list[int] | None = None
    queue: int = 8
    stage_lr: list[float] | None = None
    stage_schedulers: list[dict[str, Any] | None] | None = None
    stop_after: list[int | None] | None = None
    codec: str = "none"
    split_backward: bool = False
    compile: bool | dict[str, Any] = False
    lr_by_delay: int = 0
    track_gradients: int = 0
    timeout: float = Field(default=600.0)

    def axes(self) -> Axes:
        """The preset with the user's overrides. Raises :class:`ConfigError` where they exclude each other."""
        axes = PRESETS[self.method]
        chosen = {name: getattr(self, name) for name in AXES if getattr(self, name) is not None}
        axes = replace(axes, **chosen)
        if self.hops is not None:
            if axes.flush:
                raise ConfigError(f"{BLOCK}.hops", list(self.hops), 'with "update": "flush" nothing crosses an update',
                                  'Leave "hops" out, or take a method with a delayed update.')
            axes = replace(axes, hops=(self.hops[0], self.hops[1]))
        elif axes.flush:
            axes = replace(axes, hops=FLUSH_HOPS)
        return replace(axes, window=self._window(axes)) if axes.gradient == "local" else self._without_window(axes)

    def _without_window(self, axes: Axes) -> Axes:
        for name, default in (("window", None), ("losses", "sum"), ("head", None), ("head_refresh", 50), ("ensemble", False),
                              ("stop_after", None)):
            if getattr(self, name) != default:
                raise ConfigError(f"{BLOCK}.{name}", getattr(self, name), "it belongs to stage-local losses",
                                  'Take "method": "dgl" or "overlapping", or leave it out.')
        if axes.flush and axes.weights == "stashed":
            raise ConfigError(f"{BLOCK}.weights", "stashed",
                              'with "update": "flush" the weights are the same in the forward and the backward pass',
                              'Take "weights": "current", or "update": "delayed".')
        if axes.weights == "predicted" and (axes.flush or axes.recover == "graph"):
            raise ConfigError(f"{BLOCK}.weights", "predicted", "the backward pass runs with the current weights, which needs "
                              'a delayed update, and "recover": "input" or "reconstruct"', 'Take "method": "dsp" or "petra".')
        return replace(axes, window=0)

    def _window(self, axes: Axes) -> int:
        """The window of a local method, after a look at what it excludes."""
        window = axes.window or 1
        if self.window is not None:
            window = self.window
        if window < 1:
            raise ConfigError(f"{BLOCK}.window", window, "a number of stages, at least 1", "1 is greedy, 2 is overlapping.")
        if axes.flush:
            raise ConfigError(f"{BLOCK}.update", "flush", "stages with a loss of their own wait for no flush",
                              'Leave "update" out; a window of all stages with "losses": "farthest" is backpropagation.')
        for name, value, only in (("recover", axes.recover, "graph"), ("weights", axes.weights, "current"),
                                  ("split_backward", self.split_backward, False)):
            if value != only:
                raise ConfigError(f"{BLOCK}.{name}", value, "with local losses a stage goes back through its graph at once",
                                  f'Leave "{name}" out.')
        return window

    def compile_settings(self) -> CompileSettings | None:
        """How layers are compiled; None where they are not."""
        if isinstance(self.compile, dict):
            return CompileSettings(**self.compile)
        return CompileSettings() if self.compile else None

    @property
    def is_plain_backprop(self) -> bool:
        """Nothing to decouple: 1F1B with a flush, which DeepSpeed's own engine runs."""
        return self.axes() == PRESETS["backprop"]


def check_bounds(setting: str, value: list[int]) -> None:
    """A list of bounds starts at 0 and grows. Raises :class:`ConfigError` if it does not."""
    if len(value) < 2 or value[0] != 0 or any(a >= b for a, b in pairwise(value)):
        raise ConfigError(setting, value, "a list gives the layer at which each part begins, then the number of "
                          "layers: it starts at 0 and grows", "For example [0, 4, 9] for two parts of nine layers.")


def _check(config: DecoupledConfig) -> None:
    check_choice(f"{BLOCK}.method", config.method, tuple(PRESETS))
    for name, allowed in AXES.items():
        value = getattr(config, name)
        if value is not None:
            check_choice(f"{BLOCK}.{name}", value, allowed)
    check_choice(f"{BLOCK}.codec", config.codec, get_args(Codec))
    check_choice(f"{BLOCK}.losses", config.losses, ("sum", "farthest"))
    if not 1 <= config.queue <= MOST_QUEUE:
        raise ConfigError(f"{BLOCK}.queue", config.queue, f"a number of micro-batches, from 1 to {MOST_QUEUE}: so many "
                          "outputs of a stage may be kept until the next one takes them", "Leave it out for 8.")
    if config.window is not None and config.window > MOST_STAGES:
        raise ConfigError(f"{BLOCK}.window", config.window, "at most the number of stages", "1 is greedy, 2 is overlapping.")
    if config.input_shape is not None and (not config.input_shape or min(config.input_shape) < 1
                                           or math.prod(config.input_shape) > MOST_NUMBERS):
        raise ConfigError(f"{BLOCK}.input_shape", config.input_shape, "the sizes of one sample, each at least 1, "
                          f"of at most {MOST_NUMBERS} numbers in all", "For example [3, 32, 32], or [128] for 128 token ids.")
    if config.head_refresh < 1:
        raise ConfigError(f"{BLOCK}.head_refresh", config.head_refresh, "a number of updates, at least 1",
                          "Leave it out for 50.")
    if any(limit is not None and limit < 0 for limit in config.stop_after or ()):
        raise ConfigError(f"{BLOCK}.stop_after", config.stop_after, "a number of updates for each stage, 0 for a frozen one",
                          "null is for a stage that never stops.")
    for scheduler in config.stage_schedulers or ():
        if scheduler is not None and (not isinstance(scheduler.get("type"), str) or scheduler.keys() - {"type", "params"}):
            raise ConfigError(f"{BLOCK}.stage_schedulers", scheduler, "a scheduler is an object with type and params",
                              'For example {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}, or null.')
    if not all(0 <= factor < math.inf for factor in config.stage_lr or ()):  # also refuses NaN
        raise ConfigError(f"{BLOCK}.stage_lr", config.stage_lr, "a factor for each stage, none below 0 and all finite",
                          "0 is for a stage whose weights stay as they are.")
    if isinstance(config.stages, str):
        check_choice(f"{BLOCK}.stages", config.stages, ("ranks", "blocks"))
    elif isinstance(config.stages, int):
        if config.stages < 1:
            raise ConfigError(f"{BLOCK}.stages", config.stages, "at least 1 stage is needed",
                              'Give a number, "ranks" or "blocks".')
        if config.stages > MOST_STAGES:
            raise ConfigError(f"{BLOCK}.stages", config.stages, f"at most {MOST_STAGES}, and no more than the model has layers",
                              'Give a number, "ranks" or "blocks".')
    else:
        check_bounds(f"{BLOCK}.stages", config.stages)
    if isinstance(config.partition, str):
        check_choice(f"{BLOCK}.partition", config.partition, ("parameters", "uniform", "profile"))
    else:
        check_bounds(f"{BLOCK}.partition", config.partition)
    if config.hops is not None and (len(config.hops) != 2 or config.hops[0] < 0 or config.hops[1] < 1):
        raise ConfigError(f"{BLOCK}.hops", list(config.hops), "two whole numbers [a, b] with a >= 0 and b >= 1: ticks "
                          "from stage to stage, forward and backward",
                          "The paper's PETRA is [1, 1]; half the delay is [0, 1].")
    if config.hops is not None and max(config.hops) > MOST_HOPS:
        raise ConfigError(f"{BLOCK}.hops", list(config.hops), f"at most {MOST_HOPS} ticks from stage to stage: of J stages "
                          "the first keeps (a+b)(J-1)+1 micro-batches, and its gradients are as old",
                          "The paper's PETRA is [1, 1]; half the delay is [0, 1].")
    if config.lr_by_delay < 0:
        raise ConfigError(f"{BLOCK}.lr_by_delay", config.lr_by_delay, "0 (off) or the updates over which the damping fades",
                          "For example a quarter of all updates, or leave the setting out.")
    if config.lr_by_delay and config.axes().flush:
        raise ConfigError(f"{BLOCK}.lr_by_delay", config.lr_by_delay, 'with "update": "flush" no gradient comes late',
                          'Leave "lr_by_delay" out, or take a method with a delayed update.')
    if config.track_gradients < 0:
        raise ConfigError(f"{BLOCK}.track_gradients", config.track_gradients,
                          "0 (never) or every so many micro-batches", "For example 100, or leave the setting out.")
    if not 0 < config.timeout <= YEAR:  # also refuses NaN
        raise ConfigError(f"{BLOCK}.timeout", config.timeout, f"seconds, above 0 and at most {YEAR} (a year)",
                          "Leave it out for 600.")
    config.axes()
    _check_compile(config)


def _check_compile(config: DecoupledConfig) -> None:
    name = f"{BLOCK}.compile"
    for key in config.compile if isinstance(config.compile, dict) else ():
        check_choice(name, key, tuple(field.name for field in fields(CompileSettings)))
    settings = config.compile_settings()
    if settings is None:
        return
    check_choice(f"{name}.backend", str(settings.backend), BACKENDS)
    if settings.mode in ("reduce-overhead", "max-autotune"):
        raise ConfigError(f"{name}.mode", settings.mode, "its CUDA graphs write every output to the same place, where messages "
                          "in flight are still to be read", f"Take one of {', '.join(map(repr, MODES))}.")
    check_choice(f"{name}.mode", str(settings.mode), MODES)
    if settings.backend != "inductor" and settings.mode != "default":
        raise ConfigError(f"{name}.mode", settings.mode, "modes are inductor's, other backends have none", 'Leave "mode" out.')
    if not isinstance(settings.dynamic, bool | None):
        raise ConfigError(f"{name}.dynamic", settings.dynamic, "true, false or null", "Leave it out if you are not sure.")
    if config.split_backward:
        raise ConfigError(name, config.compile, 'a compiled backward pass cannot be halved, as "split_backward" would',
                          "Leave one of the two out.")
    if config.is_plain_backprop:
        raise ConfigError(name, config.compile, "this method is DeepSpeed's own engine, which compiles on demand",
                          "Leave it out and call engine.compile().")


def parse_block(config: Source) -> DecoupledConfig | None:
    """The ``decoupled`` block of a DeepSpeed configuration, checked; None where there is none.

    Raises:
        ConfigError: naming the setting, its value and what is allowed.
    """
    return block_of(read_json(config))


def block_of(config: Mapping[str, Any]) -> DecoupledConfig | None:
    """The same of a configuration that has been read."""
    raw = config.get(BLOCK)
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ConfigError(BLOCK, raw, 'an object such as {"method": "petra"}', "Leave it out for plain DeepSpeed.")
    if "method" not in raw:
        raise ConfigError(f"{BLOCK}.method", None, f"a method is needed: {', '.join(map(repr, PRESETS))}",
                          'For example {"method": "petra"}.')
    for key in raw:
        check_choice(BLOCK, key, tuple(DecoupledConfig.model_fields))
    try:
        parsed = DecoupledConfig(**raw)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        types = dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in error.errors() if e["loc"][0] == name)
        raise ConfigError(f"{BLOCK}.{name}", raw[name], f"needed is {' or '.join(types)}",
                          "In JSON, numbers, true and false stand without quotes.") from error
    _check(parsed)
    return parsed
