"""The ``decoupled`` block of a DeepSpeed JSON file: each setting's type, range and words.

>>> parse_block({"decoupled": {"method": "petra"}}).axes()
Axes(gradient='global', recover='reconstruct', weights='current', update='delayed', input='stream', hops=(1, 1), window=0)

Which method a block stands for is :mod:`ds_decoupled.axes`'s business, which of its settings have an effect there
:mod:`ds_decoupled.settings.belongs`'s, how a mistake is told :mod:`ds_decoupled.settings.blocks`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ds_decoupled.axes import AXES, FLUSH_HOPS, PRESETS, Axes, Gradient, Input, Pace, Recover, Update, Weights, resolve
from ds_decoupled.errors import ConfigError
from ds_decoupled.schedules.asynchronous import OwnPace
from ds_decoupled.schedules.replay import Replay
from ds_decoupled.schedules.turns import Clock
from ds_decoupled.settings import check_choice, read_json
from ds_decoupled.settings.auxnet import AuxNetSettings, auxnet_object, check_auxnet
from ds_decoupled.settings.belongs import check_belongs
from ds_decoupled.settings.blocks import STRICT, Words, read_model
from ds_decoupled.settings.codecs import CODEC_NAMES, CodecName, CodecSettings, VectorSettings, both_ways, vectors
from ds_decoupled.settings.reading import Source
from ds_decoupled.settings.replay import MOST_QUEUE, ClockSettings, ReplaySettings
from ds_decoupled.settings.table import BLOCK
from ds_decoupled.settings.teaching import TeachingSettings, teaching_object
from ds_decoupled.settings.threads import (
    ExchangeSettings,
    PassTimes,
    ThreadSettings,
    exchanged,
    or_auto,
    or_kind,
    threads_of,
    with_workers,
)

__all__ = ["AXES", "BLOCK", "CODEC_NAMES", "FLUSH_HOPS", "PRESETS", "AuxNetSettings", "Axes", "CodecName", "CodecSettings",
           "CompileSettings", "DecoupledConfig", "VectorSettings", "block_of", "check_bounds", "parse_block", "read_json"]

#: Bounds of what makes sense. A stage keeps up to ``(a+b)(J-1)+1`` micro-batches, and needs a layer of its own.
MOST_HOPS = 1_000
MOST_STAGES = 10_000
MOST_NUMBERS = 2**31  # of one sample
YEAR = 31_536_000  # seconds


def check_bounds(setting: str, value: list[int]) -> None:
    """A list of bounds starts at 0 and grows. Raises :class:`ConfigError` if it does not."""
    if len(value) < 2 or value[0] != 0 or any(a >= b for a, b in pairwise(value)):
        raise ConfigError(setting, value, "a list gives the layer at which each part begins, then the number of "
                          "layers: it starts at 0 and grows", "For example [0, 4, 9] for two parts of nine layers.")


def _bounds(value: list[int]) -> list[int]:
    check_bounds(BLOCK, value)
    return value


def _preset(value: str) -> str:
    check_choice(BLOCK, value, tuple(PRESETS))
    return value


def _pair(value: list[int]) -> list[int]:
    if value[1] < 1:
        raise ConfigError(BLOCK, value, HOPS.allowed, HOPS.hint)
    return value


def _sample(value: list[int]) -> list[int]:
    if math.prod(value) > MOST_NUMBERS:
        raise ConfigError(BLOCK, value, SAMPLE.allowed, SAMPLE.hint)
    return value


def _schedulers(value: list[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    for scheduler in value:
        if scheduler is not None and (not isinstance(scheduler.get("type"), str) or scheduler.keys() - {"type", "params"}):
            raise ConfigError(BLOCK, scheduler, "a scheduler is an object with type and params",
                              'For example {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}, or null.')
    return value


def _on_or_block(value: Any) -> Any:
    """A nested object may be switched on and off: true is its defaults, false is none."""
    if isinstance(value, bool):
        return {} if value else None
    if not isinstance(value, Mapping | BaseModel):
        raise ValueError('a boolean is needed, or an object such as {"backend": "inductor"}')
    return value


HOPS = Words(f"two whole numbers [a, b] with a >= 0 and b >= 1, at most {MOST_HOPS}: ticks from stage to stage, forward and "
             "backward; of J stages the first keeps (a+b)(J-1)+1 micro-batches, and its gradients are as old",
             "The paper's PETRA is [1, 1]; half the delay is [0, 1].")
SAMPLE = Words(f"the sizes of one sample, each at least 1, of at most {MOST_NUMBERS} numbers in all",
               "For example [3, 32, 32], or [128] for 128 token ids.")
Bounds = Annotated[list[int], AfterValidator(_bounds)]
Hops = Annotated[list[Annotated[int, Field(ge=0, le=MOST_HOPS)]], Field(min_length=2, max_length=2), AfterValidator(_pair),
                 BeforeValidator(lambda value: list(value) if isinstance(value, tuple) else value), HOPS]
Sample = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1), AfterValidator(_sample), SAMPLE]


class CompileSettings(BaseModel):
    """How layers are compiled, see :mod:`ds_decoupled.stages.compiled`.

    Attributes:
        backend: ``inductor``, or ``aot_eager``, which writes no code: it shows whose fault a number is.
        mode: inductor's; ``max-autotune-no-cudagraphs`` times several kernels for each product of matrices.
        dynamic: whether shapes may change without compiling again; None: from the first change on.
    """

    model_config = STRICT

    backend: Literal["inductor", "aot_eager"] = "inductor"
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    dynamic: Annotated[bool | None, Words("true, false or null", "Leave it out if you are not sure.")] = None

    @field_validator("mode", mode="before")
    @classmethod
    def _no_graphs(cls, value: Any) -> Any:
        if value in ("reduce-overhead", "max-autotune"):
            raise ConfigError(BLOCK, value, "its CUDA graphs write every output to the same place, where messages in flight "
                              "are still to be read", "Take one of 'default', 'max-autotune-no-cudagraphs'.")
        return value

    @field_validator("mode", mode="after")
    @classmethod
    def _of_inductor(cls, value: str, info: ValidationInfo) -> str:
        if value != "default" and info.data.get("backend") != "inductor":
            raise ConfigError(BLOCK, value, "modes are inductor's, other backends have none", 'Leave "mode" out.')
        return value


class DecoupledConfig(BaseModel):
    """The ``decoupled`` block; :func:`parse_block` reads it, and tells mistakes as :class:`ConfigError`.

    Attributes:
        method: a preset's name.
        stages: J: a number, ``"ranks"`` (one per rank), ``"blocks"`` (one per block that the model marks), or the
            layer indices at which stages begin and the last one ends.
        partition: how layers are spread over stages and stages over ranks: ``"parameters"``, ``"uniform"``,
            ``"profile"`` (measured time), or the layer indices at which ranks begin and the last one ends. A head made of
            the model's layers weighs what they do.
        hops: ticks that a message takes from stage to stage, forward and backward.
        gradient, recover, weights, update, input: override one axis of the preset.
        pace: where the order of actions comes from: a plan's ``ticks``, a virtual ``clock``, or ranks that run ``free``.
        replay: the ring before each stage: an object of :class:`ReplaySettings`' attributes.
        clock: an object of :class:`ClockSettings`' attributes.
        threads: who goes forward and who goes back: an object of :class:`ThreadSettings`' attributes, or ``"auto"``.
        pass_times: how long passes take on the clock: an object of :class:`PassTimes`' attributes.
        exchange: what replicas exchange whose threads run free: a kind, or an object of :class:`ExchangeSettings`' attributes.
        slow_down: each stage made so many times slower (one factor per stage): by a longer duration or a rarer draw on the
            clock, by sleep where ranks run free.
        window: with local gradients: stages whose losses reach a stage, its own among them. 1 is greedy, 2 overlapping.
        losses: which of the window's losses a stage learns from: their ``"sum"`` or the ``"farthest"`` alone.
        head: what a stage's own loss is taken from: a name of :data:`ds_decoupled.nn.HEADS`, copies of the model's own
            layers, or ``"module:callable"`` (:mod:`ds_decoupled.nn.heads`); by default ``"lm"`` where stages give
            ``(N, T, width)``, ``"mlp"`` where ``(N, features)``, else ``"mlp-sr"``.
        head_lr: the learning rate of a stage's head, as a factor of the stage's.
        head_teaching: how heads are taught before anybody learns from them: an object of :class:`TeachingSettings`' attributes.
        head_refresh: updates after which a shared head is brought up to date.
        transport: factor of the penalty on what residual layers add to what passes through them, part of every stage's own loss
            (:mod:`ds_decoupled.stages.transport`); 0 is none.
        ensemble: whether evaluation asks all heads, and takes the mean of their probabilities.
        input_shape: of one sample, so that heads can be built where the module has no ``sample_input``. Token ids are
            tried first where it has one dimension, numbers elsewhere; then the other.
        queue: micro-batches that a rank may run ahead of the next where nothing comes back from it.
        stage_lr: the learning rate of each stage, as a factor (one per stage).
        stage_schedulers: the LR scheduler of each stage, as DeepSpeed's ``scheduler`` block; null is for the JSON's own.
        stop_after: updates after which each stage stops learning (one per stage; null: never). It goes on forwarding in
            evaluation mode.
        codec: how floating-point payloads travel between ranks: a name, or an object of :class:`CodecSettings`' attributes.
        vq: an object of :class:`VectorSettings`' attributes.
        auxnet: how stages' inputs are generated: an object of :class:`AuxNetSettings`' attributes.
        split_backward: send a gradient down before the weights' own gradients are computed.
        compile: ``torch.compile`` the layers: true, or an object of :class:`CompileSettings`' attributes.
        lr_by_delay: updates over which the damping of late stages' learning rates fades (PipeMare's T1,
            :mod:`ds_decoupled.optim.lr_by_delay`); 0 is no damping.
        track_gradients: compare the gradient used with the exact one every so many micro-batches; 0 is never.
        timeout: seconds that a rank waits for a message before it gives up.
    """

    model_config = STRICT

    method: Annotated[str, AfterValidator(_preset),
                      Words(f"a method is needed: {', '.join(map(repr, PRESETS))}", 'For example {"method": "petra"}.')]
    stages: Annotated[Annotated[int, Field(ge=1, le=MOST_STAGES)] | Literal["ranks", "blocks"] | Bounds, Words(
        f"at least 1 stage is needed, and at most {MOST_STAGES}: no more than the model has layers",
        'Give a number, "ranks" or "blocks".')] = "ranks"
    partition: Literal["parameters", "uniform", "profile"] | Bounds = "parameters"
    hops: Hops | None = None
    gradient: Gradient | None = None
    recover: Recover | None = None
    weights: Weights | None = None
    update: Update | None = None
    input: Input | None = None
    pace: Pace | None = None
    replay: Annotated[ReplaySettings, Words(
        'an object such as {"size": 10}', "Leave it out for a ring of 10.")] = ReplaySettings()
    clock: Annotated[ClockSettings, Words(
        'an object such as {"seed": 1}', "Leave it out for turns by chance.")] = ClockSettings()
    threads: Annotated[ThreadSettings, BeforeValidator(or_auto), Words(
        hint="Leave it out for 1 forward and 2 backward threads.")] = ThreadSettings()
    pass_times: Annotated[PassTimes, Words(
        'an object such as {"forward": [1, 1], "backward": [2, 2]}', "Leave it out for 1 forward and 2 back.")] = PassTimes()
    exchange: Annotated[ExchangeSettings | None, BeforeValidator(or_kind), Words(
        hint='Leave it out for "gossip".')] = None
    slow_down: Annotated[list[Annotated[float, Field(ge=1, allow_inf_nan=False)]] | None, Words(
        "a factor for each stage, none below 1 and all finite", "1 is for a stage that is as fast as it is.")] = None
    window: Annotated[int | None, Field(ge=1, le=MOST_STAGES), Words(
        "a number of stages, at least 1 and at most all of them", "1 is greedy, 2 is overlapping.")] = None
    losses: Literal["sum", "farthest"] = "sum"
    head: str | None = None
    head_lr: Annotated[float, Field(ge=0, allow_inf_nan=False), Words(
        "a factor, 0 or above and finite", "Leave it out for the stage's own rate.")] = 1.0
    head_teaching: Annotated[TeachingSettings | None, BeforeValidator(teaching_object), Words(
        hint="Leave it out for none.")] = None
    head_refresh: Annotated[int, Field(ge=1), Words("a number of updates, at least 1", "Leave it out for 50.")] = 50
    transport: Annotated[float, Field(ge=0, allow_inf_nan=False), Words(
        "a factor, 0 (none) or above", "Leave it out for none.")] = 0.0
    ensemble: bool = False
    input_shape: Sample | None = None
    queue: Annotated[int, Field(ge=1, le=MOST_QUEUE), Words(
        f"a number of micro-batches, from 1 to {MOST_QUEUE}: so many outputs of a stage may be kept until the next one takes "
        "them", "Leave it out for 8.")] = 8
    stage_lr: Annotated[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None, Words(
        "a factor for each stage, none below 0 and all finite", "0 is for a stage whose weights stay as they are.")] = None
    stage_schedulers: Annotated[list[dict[str, Any] | None], AfterValidator(_schedulers)] | None = None
    stop_after: Annotated[list[Annotated[int, Field(ge=0)] | None] | None, Words(
        "a number of updates for each stage, 0 for a frozen one", "null is for a stage that never stops.")] = None
    codec: Annotated[CodecSettings, BeforeValidator(both_ways), Words(hint="Leave it out for none.")] = CodecSettings()
    vq: Annotated[VectorSettings, BeforeValidator(vectors), Words(hint="Leave it out for the defaults.")] = VectorSettings()
    auxnet: Annotated[AuxNetSettings, BeforeValidator(auxnet_object), Words(
        hint="Leave it out for the defaults.")] = AuxNetSettings()
    split_backward: bool = False
    compile: Annotated[CompileSettings | None, BeforeValidator(_on_or_block), Words(hint="Leave it out for none.")] = None
    lr_by_delay: Annotated[int, Field(ge=0), Words(
        "0 (off) or the updates over which the damping fades",
        "For example a quarter of all updates, or leave the setting out.")] = 0
    track_gradients: Annotated[int, Field(ge=0), Words(
        "0 (never) or every so many micro-batches", "For example 100, or leave the setting out.")] = 0
    timeout: Annotated[float, Field(gt=0, le=YEAR, allow_inf_nan=False), Words(
        f"seconds, above 0 and at most {YEAR} (a year)", "Leave it out for 600.")] = 600.0

    _axes: Axes = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, block: Any) -> Any:
        return with_workers(block)

    @model_validator(mode="after")
    def _resolve(self) -> DecoupledConfig:
        """The axes, once; and every setting that was given has an effect there."""
        settings = {name: getattr(self, name) for name in DecoupledConfig.model_fields}
        hops = None if self.hops is None else (self.hops[0], self.hops[1])
        self._axes = resolve(self.method, {name: settings[name] for name in AXES}, hops, self.window, self.pace,
                             self.auxnet.kappa)
        given = {name: value for name, value in settings.items() if value != DecoupledConfig.model_fields[name].default}
        check_belongs(self._axes, given, settings)
        if self._axes.input == "auxnet":
            check_auxnet(self.auxnet, self._axes.kappa)
        return self

    def axes(self) -> Axes:
        """The preset with the user's overrides."""
        return self._axes

    def compile_settings(self) -> CompileSettings | None:
        """How layers are compiled; None where they are not."""
        return self.compile

    def own_pace(self) -> OwnPace:
        """How stages go at their own pace, where they do."""
        ring, clock = self.replay, self.clock
        return OwnPace(Replay(ring.size, ring.cap, ring.authors_ring),
                       Clock(clock.seed, None if clock.durations is None else tuple(clock.durations),
                             None if self.slow_down is None else tuple(self.slow_down), clock.warm_start),
                       threads_of(self.threads, self.pass_times), exchanged(self.method, self.exchange))

    @property
    def sweeps(self) -> int:
        """Of a micro-batch over all stages, where inputs are generated; 0 elsewhere."""
        return self.auxnet.sweeps if self._axes.input == "auxnet" else 0

    @property
    def is_plain_backprop(self) -> bool:
        """Nothing to decouple: 1F1B with a flush, which DeepSpeed's own engine runs."""
        return self._axes.plain


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
    for key in raw:
        check_choice(BLOCK, key, tuple(DecoupledConfig.model_fields))
    return read_model(DecoupledConfig, raw, BLOCK)
