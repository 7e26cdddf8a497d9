"""Which setting of the ``decoupled`` block belongs to which value of which axis: what would do nothing is refused.

One row says where a setting has an effect, as conditions on the axes (or on another setting) that must all hold, and why it has
none elsewhere. From it come the refusals, and the column "belongs to" of the tables in ``README.md`` and ``docs/``. A new
setting, or a system's nested object, is a row more.

>>> from ds_decoupled.axes import resolve
>>> check_belongs(resolve("dsp", {}), {"queue": 4})
Traceback (most recent call last):
ds_decoupled.errors.ConfigError: "decoupled.queue": 4 cannot be used: with "gradient": "global" what comes back keeps ranks \
together; it belongs to "gradient": "local" and "window": 1. Leave it out, or take "method": "dgl".

Pure Python: no torch, no pydantic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_decoupled.axes import AXES, Axes
from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.table import BLOCK

#: What :func:`belongs_to` says of a setting that has an effect under every method.
EVERY = "every method"


@dataclass(frozen=True)
class Need:
    """One condition.

    Attributes:
        name: of an axis, a property of :class:`~ds_decoupled.axes.Axes`, or another setting.
        holds: whether it is met by that one's value.
        words: which values meet it.
        unmet: what stands against it; None for the name with its value.
    """

    name: str
    holds: Callable[[Any], bool]
    words: str
    unmet: str | Callable[[Axes], str] | None = None

    def against(self, axes: Axes, settings: Mapping[str, Any]) -> str | None:
        """What stands against the condition, in words; None where it is met."""
        value = getattr(axes, self.name) if hasattr(axes, self.name) else settings.get(self.name)
        if self.holds(value):
            return None
        unmet = self.unmet(axes) if callable(self.unmet) else self.unmet
        return unmet or f'"{self.name}": {json.dumps(value)}'


def axis(name: str, *values: Any) -> Need:
    """The condition that an axis has one of ``values``."""
    return Need(name, lambda value: value in values, f'"{name}": {" or ".join(map(json.dumps, values))}')


DECOUPLED = Need("plain", lambda plain: not plain, 'any method but "backprop"',
                 unmet='"update": "flush" and "recover": "graph" the engine is DeepSpeed\'s own, as with "method": "backprop":')
LOCAL = axis("gradient", "local")
#: What stages with losses of their own cannot have, all others can.
GLOBAL = Need("gradient", lambda gradient: gradient not in ("local", "auxiliary"), '"gradient": "global"')
AUXILIARY = axis("gradient", "auxiliary")
AUXNET = axis("input", "auxnet")
DELAYED = axis("update", "delayed")
OUTLIVED = axis("update", "delayed", "layerwise")
LAYERWISE = axis("update", "layerwise")
#: What the threads of a layer-wise update cannot have, all others can.
PLANNED = Need("update", lambda update: update != "layerwise", 'an "update" other than "layerwise"')
UNPLANNED = Need("unplanned", bool, '"input": "replay" or "update": "layerwise"',
                 unmet=lambda axes: f'"input": {json.dumps(axes.input)}')
KEPT = axis("recover", "graph")
#: Shapes are to be known before anything is built from them.
SHAPED = axis("gradient", "local", "auxiliary")
#: Every stage works on the same micro-batches.
IN_STEP = axis("input", "stream", "auxnet")
REPLAY = axis("input", "replay")
STREAM = axis("input", "stream")
OWN_PACE = axis("pace", "clock", "free")
ALONE = axis("window", 1)
#: Gradients come back to a stage from others.
TOGETHER = Need("window", lambda window: window != 1, 'a "window" other than 1')
LATE = axis("gradient", "global", "local")
SHARED = Need("head", lambda head: str(head).partition(":")[0] == "shared", '"head": "shared"')
#: The object of the codec, which is read before.
VECTORS = Need("codec", lambda codec: codec is not None and codec.forward == "vq", '"codec": {"forward": "vq"}',
               unmet="another codec forward")
LOCKED = Need("threads", lambda threads: threads is None or threads.lock == "layer", '"threads": {"lock": "layer"}',
              unmet='"threads": {"lock": "none"}')
#: Heads that can be taught alone.
TAUGHT = Need("head", lambda head: str(head).partition(":")[0] not in ("shared", "reconstruct"),
              'a "head" other than "shared" or "reconstruct"')
VOTES = Need("head", lambda head: head != "reconstruct", 'a "head" other than "reconstruct"')
WHOLE = Need("split_backward", lambda split: not split, '"split_backward": false')


@dataclass(frozen=True)
class Row:
    """Where a setting, or some of its values, has an effect.

    Attributes:
        setting: its name in the block.
        needs: all must hold; none is for every method.
        why: it has no effect elsewhere, after what stands against it.
        instead: what to do.
        values: which values the row is about; None for all but the default.
        of: these, in words.
    """

    setting: str
    needs: tuple[Need, ...] = ()
    why: str = ""
    instead: str = "Leave it out."
    values: Callable[[Any], bool] | None = None
    of: str = ""

    @property
    def where(self) -> str:
        """The conditions in words."""
        return " and ".join(need.words for need in self.needs) or EVERY


#: What to do, and why not, of several rows.
LEAVE_LOCAL = 'Take "method": "dgl" or "overlapping", or leave it out.'
LEAVE_REPLAY = 'Leave it out, or take "method": "dgl_async".'
LEAVE_THREADS = 'Leave it out, or take "method": "pd_asgd".'
LEAVE_BACKPROP = 'Leave it out, or take another method.'
AT_ONCE = "a stage with local losses, or with a generated input, goes back through its graph at once"


def _local(setting: str, why: str = "no stage but the last has a loss") -> Row:
    return Row(setting, (LOCAL,), why, LEAVE_LOCAL)


def _value(setting: str, value: str, needs: tuple[Need, ...], why: str, instead: str) -> Row:
    return Row(setting, needs, why, instead, lambda given: given == value, json.dumps(value))


def _decoupled(setting: str, why: str, instead: str = LEAVE_BACKPROP) -> Row:
    return Row(setting, (DECOUPLED,), why, instead)


#: In the order in which they are looked at: the axes before what hangs on them.
ROWS: tuple[Row, ...] = (
    Row("method"), Row("stages"), Row("partition"), Row("gradient"),
    Row("window", (STREAM,), "a stage that replays its input has nobody to give a gradient to", 'Leave "window" out.',
        lambda window: window not in (None, 1), "more than 1"),
    _value("input", "replay", (LOCAL, ALONE), "a stage that replays its input has nobody to give a gradient to",
           'Take "method": "dgl_async", or "input": "stream".'),
    _value("gradient", "auxiliary", (AUXNET,), "there is no other input to compare a stage's output with",
           'Take "method": "auxnet_penalty", or leave "gradient" out.'),
    _value("input", "auxnet", (AUXILIARY,), "nothing would draw a stage's output to the next one's input",
           'Take "method": "auxnet_penalty", or "input": "stream".'),
    Row("auxnet", (AUXNET,), "no input is generated", 'Leave it out, or take "method": "auxnet_penalty".'),
    _value("input", "replay", (OWN_PACE,), "every micro-batch comes in its tick, once", 'Leave "pace" out, or take "free".'),
    Row("pace", (UNPLANNED,), "stages that stream go by a plan", 'Leave "pace" out, or take "method": "dgl_async".',
        lambda pace: pace in ("clock", "free"), '"clock" and "free"'),
    Row("replay", (REPLAY,), "there is no ring", LEAVE_REPLAY),
    Row("clock", (axis("pace", "clock"),), "nothing goes by a virtual clock", 'Leave it out, or take "pace": "clock".'),
    Row("clock", (REPLAY,), "nobody draws turns", 'Leave it out; "pass_times" say how long passes take.'),
    Row("slow_down", (OWN_PACE,), "stages wait for one another", LEAVE_REPLAY),
    Row("slow_down", (REPLAY,), "threads go through all stages", 'Leave it out; "pass_times" say how long passes take.'),
    _value("update", "layerwise", (GLOBAL,), "a stage with a loss of its own steps when its gradient exists anyway",
           'Leave "update" out.'),
    _value("update", "layerwise", (STREAM,), "a backward thread goes through all stages", 'Leave "input" out.'),
    _value("update", "layerwise", (KEPT,), "a stage rebuilds its input from what other threads change meanwhile",
           'Take "recover": "graph", or "update": "delayed".'),
    _value("update", "layerwise", (OWN_PACE,), 'each stage steps after its own backward pass with "update": "delayed"',
           'Take "update": "delayed", or leave "pace" out.'),
    Row("threads", (LAYERWISE,), "a rank goes forward and back in one thread", LEAVE_THREADS),
    Row("threads", (axis("pace", "free"),), "one thread acts for all", 'Leave "lock" out, or take "pace": "free".',
        lambda threads: threads is not None and threads.lock == "none", '"lock": "none"'),
    Row("pass_times", (LAYERWISE,), "stages wait for one another", LEAVE_THREADS),
    Row("pass_times", (axis("pace", "clock"),), "passes take their own time", 'Leave it out, or take "pace": "clock".'),
    Row("exchange", (LAYERWISE,), "replicas average every gradient", LEAVE_THREADS),
    Row("exchange", (axis("pace", "free"),), "replicas average every gradient", 'Leave it out, or take "pace": "free".'),
    Row("exchange", (LOCKED,), "updates of a stage come in no order that replicas could share",
        'Take "lock": "layer", or another exchange.', lambda value: value is not None and value.kind == "allreduce",
        '"allreduce"'),
    _value("update", "flush", (GLOBAL,), "stages wait for no flush",
           'Leave "update" out; a window of all stages with "losses": "farthest" is backpropagation.'),
    _value("recover", "input", (GLOBAL,), AT_ONCE, 'Leave "recover" out, or take "graph".'),
    _value("recover", "reconstruct", (GLOBAL,), AT_ONCE, 'Leave "recover" out, or take "graph".'),
    _value("weights", "stashed", (GLOBAL,), AT_ONCE, 'Leave "weights" out, or take "current".'),
    _value("weights", "stashed", (OUTLIVED,), "the weights are the same in the forward and the backward pass",
           'Take "weights": "current", or "update": "delayed".'),
    _value("weights", "predicted", (GLOBAL,), AT_ONCE, 'Leave "weights" out, or take "current".'),
    _value("weights", "predicted", (DELAYED, axis("recover", "input", "reconstruct")), "there is nothing to predict: the "
           "backward pass has to come later, and to run the forward pass again with the weights of then",
           'Take "method": "dsp" or "petra".'),
    Row("hops", (DELAYED,), "nothing crosses an update", 'Leave "hops" out, or take a method with a delayed update.'),
    Row("hops", (STREAM,), "a message may be used at any time", 'Leave "hops" out.'),
    Row("hops", (TOGETHER,), "nothing comes back, and the second number says how long that takes",
        "Let it be 1, as in [0, 1].", lambda value: value is not None and value[1] != 1, "its second number"),
    _local("window"), _local("losses"), _local("head"), _local("head_refresh"), _local("transport"), _local("ensemble"),
    Row("input_shape", (SHAPED,), "nothing is built from shapes", LEAVE_LOCAL),
    _local("stop_after", "a stage that stops would leave those below it without gradients"),
    _local("head_lr"), _local("head_teaching"),
    Row("head_teaching", (TAUGHT,), "no head is there that could be taught alone", "Leave it out, or take another head."),
    Row("head", (axis("pace", "ticks", "clock"),), "all ranks would have to wait for the one that refreshes it",
        'Take another head, or "pace": "clock".', lambda head: str(head).partition(":")[0] == "shared", '"shared"'),
    Row("head_refresh", (SHARED,), "there is nothing to bring up to date", 'Leave it out, or take "head": "shared".'),
    _value("head", "reconstruct", (ALONE,), "a stage that rebuilds its input learns from no loss above",
           'Leave "window" out, or take another head.'),
    Row("ensemble", (VOTES,), "lower heads rebuild their stages' inputs and say nothing of classes", "Leave it out."),
    Row("queue", (LOCAL, ALONE), "what comes back keeps ranks together", 'Leave it out, or take "method": "dgl".'),
    Row("lr_by_delay", (DELAYED, TOGETHER, LATE), "no gradient comes late by a number of updates that is known before",
        'Leave "lr_by_delay" out, or take a method with a delay.'),
    _decoupled("stage_lr", "it has one optimizer and one rate for all stages"),
    _decoupled("stage_schedulers", "it has one scheduler for all stages", 'Set "scheduler", or take another method.'),
    _decoupled("codec", "it sends tensors as they are"),
    _decoupled("vq", "it sends tensors as they are"),
    *(Row(codec, (PLANNED,), "tensors stay where they are, between threads of one process", "Leave it out.")
      for codec in ("codec", "vq")),
    Row("vq", (VECTORS,), "nothing is quantized by vectors", 'Leave it out, or take "codec": {"forward": "vq"}.'),
    _decoupled("split_backward", "its backward passes are whole"),
    Row("split_backward", (GLOBAL,), AT_ONCE, 'Leave "split_backward" out.'),
    Row("split_backward", (PLANNED,), "no rank waits for the gradient", 'Leave "split_backward" out.'),
    _decoupled("compile", "it compiles on demand", "Leave it out and call engine.compile()."),
    Row("compile", (PLANNED,), "each micro-batch in flight has layers of its own, and compiles them", "Leave it out."),
    Row("compile", (WHOLE,), "a compiled backward pass would have to be halved", "Leave one of the two out."),
    _decoupled("track_gradients", "every gradient is the exact one"),
    Row("track_gradients", (PLANNED,), "the weights change while the exact gradient is computed",
        'Leave "track_gradients" out.'),
    Row("track_gradients", (IN_STEP,), "stages work on different micro-batches", 'Leave "track_gradients" out.'),
    _decoupled("timeout", "it waits as long as its process groups do", "Leave it out, or give deepspeed.init_distributed() a "
               "timeout."),
)


def belongs_to(setting: str) -> str:
    """Where a setting has an effect, in words.

    >>> belongs_to("queue"), belongs_to("stages")
    ('"gradient": "local" and "window": 1', 'every method')
    """
    found: dict[str, dict[str, None]] = {}
    for row in ROWS:
        if row.setting == setting and row.needs:
            found.setdefault(row.of, {}).update(dict.fromkeys(need.words for need in row.needs))
    values: dict[str, list[str]] = {}  # by where they belong
    for of, words in found.items():
        values.setdefault(" and ".join(words), []).append(of)
    return "; ".join(f"{', '.join(ofs)} to {where}" if ofs != [""] else where for where, ofs in values.items()) or EVERY


def check_belongs(axes: Axes, given: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> None:
    """Every setting has an effect.

    A value that is the default's is taken everywhere: it says what happens anyway.

    Args:
        axes: the method.
        given: settings whose values are not their defaults.
        settings: all settings, for conditions on others; by default ``given``.

    Raises:
        ConfigError: for the first that has none, with the value of the axis that takes it away.
    """
    settings = given if settings is None else settings
    for row in ROWS:
        if row.setting in AXES:  # also a preset's own value, where another axis was chosen that excludes it
            value = getattr(axes, row.setting)
        elif row.setting in given:
            value = given[row.setting]
        else:
            continue
        if row.values is not None and not row.values(value):
            continue
        for need in row.needs:
            against = need.against(axes, settings)
            if against is not None:
                raise ConfigError(f"{BLOCK}.{row.setting}", value, f"with {against} {row.why}; it belongs to {row.where}",
                                  row.instead)
