"""Who works in a layer-wise run: the objects ``threads``, ``pass_times`` and ``exchange`` of the ``decoupled`` block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from ds_decoupled.errors import ConfigError
from ds_decoupled.schedules.layerwise import Exchanged, Threads
from ds_decoupled.settings.blocks import STRICT, Words
from ds_decoupled.settings.kinds import check_choice
from ds_decoupled.settings.table import BLOCK

MOST_THREADS = 64
MOST_WAITING = 1_000

_THREADS = Words(f"a number of threads, from 1 to {MOST_THREADS}", "Leave it out for 1 forward and 2 backward threads.")
Times = Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None, Words(
    "a duration for each stage, all above 0 and finite", "Leave it out for 1 forward and 2 back.")]


def or_auto(value: Any) -> Any:
    """``"auto"`` is an object whose backward threads are to be counted."""
    if isinstance(value, str):
        check_choice(BLOCK, value, ("auto",))
        return {"backward": "auto"}
    if not isinstance(value, Mapping | BaseModel):
        raise ValueError('"auto" in quotes is needed, or an object such as {"forward": 1, "backward": 2}')
    return value


class ThreadSettings(BaseModel):
    """Threads, see :mod:`ds_decoupled.runners.threaded`.

    Attributes:
        forward: threads that go forward.
        backward: threads that go back; ``"auto"``: as many as a backward pass lasts forward passes, rounded up, which is
            measured on the first micro-batches (on the virtual clock it follows from ``pass_times``).
        queue: finished forward passes that may wait until a backward thread is free. Each adds an update of staleness.
        workers: threads that go forward and back themselves, in place of these three (Hogwild, arXiv 1106.5730); null for none.
        lock: ``layer``: updates of one stage come one after the other; ``none``: as they come, as the paper has it, so that of
            two at the same moment a part may be lost (:mod:`ds_decoupled.optim.lock_free`).
    """

    model_config = STRICT

    forward: Annotated[int, Field(ge=1, le=MOST_THREADS), _THREADS] = 1
    backward: Annotated[Annotated[int, Field(ge=1, le=MOST_THREADS)] | Literal["auto"], _THREADS] = 2
    queue: Annotated[int, Field(ge=0, le=MOST_WAITING), Words(
        f"forward passes that may wait, from 0 to {MOST_WAITING}", "Leave it out for 0.")] = 0
    workers: Annotated[int | None, Field(ge=1, le=MOST_THREADS), _THREADS] = None
    lock: Literal["layer", "none"] = "layer"

    @field_validator("workers", mode="after")
    @classmethod
    def _alone(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and any(info.data.get(name) != cls.model_fields[name].default
                                     for name in ("forward", "backward", "queue")):
            raise ConfigError(BLOCK, value, 'workers go forward and back themselves, beside no "forward" and "backward" '
                              'threads and no "queue"', 'Leave "workers" out, or these.')
        return value


class PassTimes(BaseModel):
    """How long passes take on the virtual clock, see :mod:`ds_decoupled.schedules.layerwise`.

    Attributes:
        forward: of each stage, in any unit; null: 1.
        backward: likewise; null: 2.
    """

    model_config = STRICT

    forward: Times = None
    backward: Times = None


ExchangeKind = Literal["gossip", "average", "allreduce"]

#: Micro-batches from one average to the next, as LAPSGD has it (arXiv 2410.05985).
AVERAGE_EVERY = 16


def or_kind(value: Any) -> Any:
    """A kind alone is an object of it."""
    if isinstance(value, str):
        check_choice(BLOCK, value, get_args(ExchangeKind))
        return {"kind": value}
    if value is not None and not isinstance(value, Mapping | BaseModel):
        raise ValueError('"gossip", "average" or "allreduce" in quotes is needed, or an object such as {"kind": "average"}')
    return value


class ExchangeSettings(BaseModel):
    """What data-parallel replicas exchange, see :mod:`ds_decoupled.links.exchange`.

    Attributes:
        kind: ``gossip``: a stage that has stepped, with another replica; ``average``: all stages, with all replicas;
            ``allreduce``: every gradient, before it is used.
        every: updates of a stage (gossip), or micro-batches (average), from one exchange to the next.
    """

    model_config = STRICT

    kind: Annotated[ExchangeKind, Words(hint="Take one of these.")]
    every: Annotated[int | None, Field(ge=1, le=1_000_000), Words(
        "a number of updates or micro-batches, at least 1", "Leave it out for 1 (gossip) or 16 (average).")] = None

    @field_validator("every", mode="after")
    @classmethod
    def _of_weights(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("kind") == "allreduce":
            raise ConfigError(BLOCK, value, "gradients are averaged at every update", 'Leave "every" out.')
        return value


#: Settings that a preset brings, unless the block has others.
WORKERS = {"hogwild": 2, "lapsgd": 2}
EXCHANGED: dict[str, ExchangeKind] = {"lapsgd": "average"}


def with_workers(block: Any) -> Any:
    """A block whose method is one of workers has them, unless it says who goes forward and back, or is layer-wise no more."""
    if not isinstance(block, Mapping) or block.get("method") not in WORKERS or block.get("update") not in (None, "layerwise"):
        return block
    threads = block.get("threads", {})
    if not isinstance(threads, Mapping) or threads.keys() & {"forward", "backward", "queue", "workers"}:
        return block
    return {**block, "threads": {**threads, "workers": WORKERS[block["method"]]}}


def exchanged(method: str, chosen: ExchangeSettings | None) -> Exchanged:
    """The same for those who work with it; where nothing was chosen, the method's own, or gossip."""
    kind = EXCHANGED.get(method, "gossip") if chosen is None else chosen.kind
    every = None if chosen is None else chosen.every
    return Exchanged(kind, every or (AVERAGE_EVERY if kind == "average" else 1), chosen is not None)


def threads_of(threads: ThreadSettings, times: PassTimes) -> Threads:
    """The same for those who work with them."""
    ahead, back = threads.forward, None if threads.backward == "auto" else threads.backward
    if threads.workers is not None:
        ahead, back = threads.workers, 0
    forward, backward = (None if given is None else tuple(given) for given in (times.forward, times.backward))
    return Threads(ahead, back, threads.queue, threads.lock == "layer", forward, backward)
