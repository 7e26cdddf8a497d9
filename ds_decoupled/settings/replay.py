"""Stages at their own pace: the objects ``replay`` and ``clock`` of the ``decoupled`` block."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from ds_decoupled.settings.blocks import STRICT, Words

MOST_QUEUE = 100_000


class ReplaySettings(BaseModel):
    """The replay ring before every stage but the first, see :mod:`ds_decoupled.schedules.replay`.

    Attributes:
        size: M, the micro-batches that it holds.
        cap: uses of one micro-batch at most, after which the stage idles; null for any number.
        authors_ring: take the oldest of those with the fewest uses, as the published code does, not the newest.
        memory: where it lies: with the layers (``device``), or in the ``host``'s memory.
    """

    model_config = STRICT

    size: Annotated[int, Field(ge=1, le=MOST_QUEUE), Words(
        f"a number of micro-batches, from 1 to {MOST_QUEUE}", "Leave it out for 10.")] = 10
    cap: Annotated[int | None, Field(ge=1), Words(
        "a number of uses, at least 1, or null for any number", "Leave it out for any number.")] = None
    authors_ring: bool = False
    memory: Literal["device", "host"] = "device"


class ClockSettings(BaseModel):
    """Who acts next on the virtual clock, see :mod:`ds_decoupled.schedules.turns`.

    Attributes:
        seed: of the draws.
        durations: of a turn of each stage, in any unit (one per stage); null: turns are drawn by chance.
        warm_start: stages act one after the other until the rings are full, before they go their own ways.
    """

    model_config = STRICT

    seed: int = 0
    durations: Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None, Words(
        "a duration for each stage, all above 0 and finite", "Leave it out to draw turns by chance.")] = None
    warm_start: bool = True
