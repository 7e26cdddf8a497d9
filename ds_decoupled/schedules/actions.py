"""Actions as data: what one stage does with one micro-batch, and its text form, which reads back.

``3F7`` is stage 3, forward, micro-batch 7. The letters are those of :mod:`ds_decoupled.schedules.kinds`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ds_decoupled.schedules.kinds import Kind, kind_of


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that one stage does. For an update ``micro_batch`` is the update's number in this run, from 0."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.letter}{self.micro_batch}"


_PATTERN = re.compile(r"(\d+)([A-Z]+)(\d+)")


def parse_action(text: str) -> Action:
    """The inverse of ``str(action)``. Raises ValueError with the text that does not fit."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an action: expected STAGE KIND MICRO-BATCH such as '3F7'")
    try:
        kind = kind_of(match[2])
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    return Action(int(match[1]), kind, int(match[3]))


def format_actions(actions: Iterable[Action]) -> str:
    """One line: ``"0L0 0F0 0SA0"``."""
    return " ".join(map(str, actions))


def parse_actions(text: str) -> list[Action]:
    """The inverse of :func:`format_actions`."""
    return [parse_action(word) for word in text.split()]
