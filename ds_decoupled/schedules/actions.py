"""Actions as data: what one stage does with one micro-batch, and its text form, which reads back.

``3F7`` is stage 3, forward, micro-batch 7.

====  ==========================================================================
L     load the micro-batch from the data iterator (stage 0)
F     forward
X     forward, loss and backward in one (a stage that waits for no other stage's gradient)
H     forward, loss of the stage's own head, and its gradient to the input (a stage that waits for losses above it too)
G     the gradient of a loss above, passed on to the input
B     backward through the kept graph
C     backward by recomputation from the kept input
R     backward by reconstruction from the output
W     the weights' gradients, put off until the input's gradient was sent
U     update: the stage's optimizer steps; the number is the update's
SA    send an activation to the next stage, on another rank
RA    receive it
SG    send a gradient to the previous stage, on another rank
RG    receive it
SR    send a gradient together with the reconstructed input
RR    receive both
====  ==========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """What an action does."""

    LOAD = "L"
    FORWARD = "F"
    LOSS = "X"
    HEAD = "H"
    RELAY = "G"
    BACKWARD = "B"
    RECOMPUTE = "C"
    RECONSTRUCT = "R"
    WEIGHTS = "W"
    UPDATE = "U"
    SEND_ACTIVATION = "SA"
    RECV_ACTIVATION = "RA"
    SEND_GRADIENT = "SG"
    RECV_GRADIENT = "RG"
    SEND_RECONSTRUCTION = "SR"
    RECV_RECONSTRUCTION = "RR"

    @property
    def is_backward(self) -> bool:
        return self in BACKWARDS

    @property
    def is_send(self) -> bool:
        return self in MATCHING_RECV

    @property
    def is_recv(self) -> bool:
        return self in MATCHING_SEND


BACKWARDS = frozenset({Kind.BACKWARD, Kind.RECOMPUTE, Kind.RECONSTRUCT})
MATCHING_RECV = {Kind.SEND_ACTIVATION: Kind.RECV_ACTIVATION, Kind.SEND_GRADIENT: Kind.RECV_GRADIENT,
                 Kind.SEND_RECONSTRUCTION: Kind.RECV_RECONSTRUCTION}
MATCHING_SEND = {recv: send for send, recv in MATCHING_RECV.items()}

#: The backward action of each value of the ``recover`` axis.
BACKWARD_OF_RECOVER = {"graph": Kind.BACKWARD, "input": Kind.RECOMPUTE, "reconstruct": Kind.RECONSTRUCT}


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that one stage does. For an update ``micro_batch`` is the update's number, from 0."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro_batch}"


_PATTERN = re.compile(r"(\d+)([A-Z]+)(\d+)")


def parse_action(text: str) -> Action:
    """The inverse of ``str(action)``. Raises ValueError with the text that does not fit."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an action: expected STAGE KIND MICRO-BATCH such as '3F7'")
    try:
        kind = Kind(match[2])
    except ValueError:
        kinds = ", ".join(k.value for k in Kind)
        raise ValueError(f"{text!r}: no action kind {match[2]!r}; there are {kinds}") from None
    return Action(int(match[1]), kind, int(match[3]))


def format_actions(actions: Iterable[Action]) -> str:
    """One line: ``"0L0 0F0 0SA0"``."""
    return " ".join(map(str, actions))


def parse_actions(text: str) -> list[Action]:
    """The inverse of :func:`format_actions`."""
    return [parse_action(word) for word in text.split()]
