"""The table of action kinds: one row says all that anybody needs to know of a kind.

Plans, communication, the simulator, workers, pictures and DeepSpeed's instructions read this table and no other, so a new kind
is one row here (:func:`add_kind`) and one handler in a stage class (:attr:`ds_decoupled.stages.Stage.handlers`).

What an action takes and gives lies in slots. Seen from stage ``s``::

                    stage s-1                stage s                stage s+1
    BATCH --L-->
                        ... INPUT of s  -----F----->  OUTPUT of s = INPUT of s+1 ...
                        ... INPUT_GRADIENT  <--B---  OUTPUT_GRADIENT of s = INPUT_GRADIENT of s+1 ...

so that each slot but BATCH and PUT_OFF is one end of a link: link ``s`` joins stages ``s`` and ``s + 1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar


class Slot(Enum):
    """Where an action finds what it needs, and leaves what it made; the value says so in words, for errors."""

    BATCH = "the raw batch"
    INPUT = "the stage's input"
    OUTPUT = "the stage's output"
    OUTPUT_GRADIENT = "the gradient of the stage's output"
    INPUT_GRADIENT = "the gradient of the stage's input"
    PUT_OFF = "the weights' gradients that were put off"

    @property
    def travels(self) -> str | None:
        """The direction of the links of this slot: ``"forward"`` or ``"backward"``; None where it belongs to one stage."""
        if self in (Slot.INPUT, Slot.OUTPUT):
            return "forward"
        return "backward" if self in (Slot.INPUT_GRADIENT, Slot.OUTPUT_GRADIENT) else None

    def link(self, stage: int) -> int:
        """The link whose end this is at ``stage``; for a slot that belongs to one stage, the stage."""
        return stage - 1 if self in (Slot.INPUT, Slot.INPUT_GRADIENT) else stage


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of action.

    Attributes:
        letter: its text form, of capitals.
        name: of its DeepSpeed instruction.
        words: what it does, for legends.
        takes: the slot that it empties; None for none.
        gives: slots that it may fill. What nobody takes is not made.
        begins, ends: whether a micro-batch's time in flight at the stage begins or ends with it. What it ends with adds the
            micro-batch's gradients to ``.grad``.
        cost: in units of one stage's forward pass: a backward pass costs two, one to its input alone one, a forward pass that
            is run again one more; heads cost nothing here. Moving a message takes no time of the rank.
        cost_like: the kind whose cost on the same stage it has, in place of ``cost``.
        colour: of its boxes in pictures.
        in_cells: whether the staircase writes it; loads are not drawn there, and updates are a mark.
        per_update: whether its number is an update's, not a micro-batch's.
        moves: ``"send"`` or ``"receive"``, where it moves a message between ranks.
        payload: messages of one unit that such a message carries: a reconstruction, or the AuxNet's gradient, travels together
            with the stage's.
        carries: what such a message is, in words.
    """

    letter: str
    name: str
    words: str
    takes: Slot | None = None
    gives: tuple[Slot, ...] = ()
    begins: bool = False
    ends: bool = False
    cost: float = 0.0
    cost_like: Kind | None = None
    colour: str = ""
    in_cells: bool = True
    per_update: bool = False
    moves: str | None = None
    payload: int = 1
    carries: str = ""

    LOAD: ClassVar[Kind]
    FORWARD: ClassVar[Kind]
    LOSS: ClassVar[Kind]
    HEAD: ClassVar[Kind]
    GENERATE: ClassVar[Kind]
    ALONE: ClassVar[Kind]
    PROBE: ClassVar[Kind]
    TARGET: ClassVar[Kind]
    RELAY: ClassVar[Kind]
    BACKWARD: ClassVar[Kind]
    RECOMPUTE: ClassVar[Kind]
    RECONSTRUCT: ClassVar[Kind]
    WEIGHTS: ClassVar[Kind]
    UPDATE: ClassVar[Kind]
    SEND_ACTIVATION: ClassVar[Kind]
    RECV_ACTIVATION: ClassVar[Kind]
    SEND_GRADIENT: ClassVar[Kind]
    RECV_GRADIENT: ClassVar[Kind]
    SEND_RECONSTRUCTION: ClassVar[Kind]
    RECV_RECONSTRUCTION: ClassVar[Kind]
    SEND_LESSON: ClassVar[Kind]
    RECV_LESSON: ClassVar[Kind]

    @property
    def computes(self) -> bool:
        """Whether it takes a rank's time; the others move messages."""
        return self.moves is None

    @property
    def is_send(self) -> bool:
        return self.moves == "send"

    @property
    def is_recv(self) -> bool:
        return self.moves == "receive"

    @property
    def is_backward(self) -> bool:
        """Whether it is the backward pass of a stage that had to wait for a gradient."""
        return self.ends and not self.begins

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return kind_of, (self.letter,)  # a copy is the same row

    def __repr__(self) -> str:
        return f"Kind({self.letter})"


KINDS: dict[str, Kind] = {}
"""Every row, by its letter, in the order of the table."""


def add_kind(kind: Kind) -> Kind:
    """Add a row to the table.

    Raises:
        ValueError: if its letter or its colour is taken, or the letter does not read back.
    """
    if not (kind.letter.isalpha() and kind.letter.isupper() and kind.letter.isascii()):
        raise ValueError(f"the letter of an action kind must be of capitals, and {kind.letter!r} is not")
    for other in KINDS.values():
        if other.letter == kind.letter or other.name == kind.name or (kind.colour and other.colour == kind.colour):
            raise ValueError(f"action kind {kind.letter!r} ({kind.name}) has a letter, name or colour of {other.letter!r} "
                             f"({other.name})")
    KINDS[kind.letter] = kind
    return kind


def kind_of(letter: str) -> Kind:
    """The row of ``letter``. Raises ValueError that lists the letters there are."""
    if letter not in KINDS:
        raise ValueError(f"no action kind {letter!r}; there are {', '.join(KINDS)}")
    return KINDS[letter]


_BOTH_WAYS = (Slot.OUTPUT, Slot.INPUT_GRADIENT)
_BACK = (Slot.INPUT_GRADIENT, Slot.PUT_OFF)

Kind.LOAD = add_kind(Kind(
    "L", "Load", "load the micro-batch", Slot.BATCH, (Slot.INPUT,), colour="#e8e4d8", in_cells=False))
Kind.FORWARD = add_kind(Kind(
    "F", "Forward", "forward", Slot.INPUT, (Slot.OUTPUT,), begins=True, cost=1, colour="#8fb8de"))
# Of a stage that waits for no other stage's gradient.
Kind.LOSS = add_kind(Kind(
    "X", "ForwardLossBackward", "forward, loss and backward", Slot.INPUT, (*_BOTH_WAYS, Slot.PUT_OFF), begins=True, ends=True,
    cost=3, colour="#b8a1d9"))
# Of a stage that waits for losses above it too.
Kind.HEAD = add_kind(Kind(
    "H", "ForwardHead", "forward, own loss and its gradient to the input", Slot.INPUT, _BOTH_WAYS, begins=True, cost=2,
    colour="#5f93c4"))
Kind.RELAY = add_kind(Kind(
    "G", "Relay", "gradient of a loss above, passed on", Slot.OUTPUT_GRADIENT, (Slot.INPUT_GRADIENT,), cost=1,
    colour="#d7e39a"))
Kind.BACKWARD = add_kind(Kind(
    "B", "Backward", "backward through the kept graph", Slot.OUTPUT_GRADIENT, _BACK, ends=True, cost=2, colour="#8cc9a1"))
Kind.RECOMPUTE = add_kind(Kind(
    "C", "BackwardRecompute", "backward by recomputation", Slot.OUTPUT_GRADIENT, _BACK, ends=True, cost=3, colour="#f2c079"))
Kind.RECONSTRUCT = add_kind(Kind(
    "R", "BackwardReconstruct", "backward by reconstruction", Slot.OUTPUT_GRADIENT, _BACK, ends=True, cost=3,
    colour="#e59a8f"))
# Of a stage whose input is generated; its own generated input it has from the stage below.
Kind.GENERATE = add_kind(Kind(
    "N", "GenerateInput", "the next stage's input, by the AuxNet", Slot.INPUT, (Slot.OUTPUT,), cost=0.1, colour="#dcbf8a"))
Kind.ALONE = add_kind(Kind(
    "P", "ForwardBackwardAlone", "forward and backward against the next stage's generated input", gives=(Slot.INPUT_GRADIENT,),
    begins=True, ends=True, cost=3, colour="#9fc5a8"))
Kind.PROBE = add_kind(Kind(
    "Q", "ForwardProbe", "the same, first of several sweeps", gives=(Slot.INPUT_GRADIENT,), begins=True, cost=2,
    colour="#7fb6c9"))
Kind.TARGET = add_kind(Kind(
    "T", "AuxNetTarget", "what the AuxNet is to reproduce", Slot.OUTPUT_GRADIENT, (Slot.INPUT_GRADIENT,), cost=0.2,
    colour="#c98f5a"))
Kind.WEIGHTS = add_kind(Kind(
    "W", "WeightGradients", "weights' gradients, behind the send", Slot.PUT_OFF, cost=1, cost_like=Kind.FORWARD,
    colour="#c9c9c9"))
Kind.UPDATE = add_kind(Kind(
    "U", "Update", "the stage's update", colour="#6e6e6e", in_cells=False, per_update=True))
Kind.SEND_ACTIVATION = add_kind(Kind(
    "SA", "SendActivation", "send an activation to the next rank", takes=Slot.OUTPUT, moves="send", carries="activation"))
Kind.RECV_ACTIVATION = add_kind(Kind(
    "RA", "RecvActivation", "receive it", gives=(Slot.INPUT,), moves="receive", carries="activation"))
Kind.SEND_GRADIENT = add_kind(Kind(
    "SG", "SendGradient", "send a gradient to the previous rank", takes=Slot.INPUT_GRADIENT, moves="send", carries="gradient"))
Kind.RECV_GRADIENT = add_kind(Kind(
    "RG", "RecvGradient", "receive it", gives=(Slot.OUTPUT_GRADIENT,), moves="receive", carries="gradient"))
Kind.SEND_RECONSTRUCTION = add_kind(Kind(
    "SR", "SendReconstruction", "send a gradient together with the reconstructed input", takes=Slot.INPUT_GRADIENT,
    moves="send", payload=2, carries="gradient and reconstruction"))
Kind.RECV_RECONSTRUCTION = add_kind(Kind(
    "RR", "RecvReconstruction", "receive both", gives=(Slot.OUTPUT_GRADIENT,), moves="receive", payload=2,
    carries="gradient and reconstruction"))
Kind.SEND_LESSON = add_kind(Kind(
    "SL", "SendLesson", "send a gradient together with that of the AuxNet", takes=Slot.INPUT_GRADIENT, moves="send", payload=2,
    carries="gradient and the AuxNet's"))
Kind.RECV_LESSON = add_kind(Kind(
    "RL", "RecvLesson", "receive both gradients", gives=(Slot.OUTPUT_GRADIENT,), moves="receive", payload=2,
    carries="gradient and the AuxNet's"))

#: The backward action of each value of the ``recover`` axis.
BACKWARD_OF_RECOVER = {"graph": Kind.BACKWARD, "input": Kind.RECOMPUTE, "reconstruct": Kind.RECONSTRUCT}


def matching(kind: Kind) -> Kind:
    """The receive of a send, or the send of a receive: the other end of the same message."""
    return next(other for other in KINDS.values()
                if other.moves and other.moves != kind.moves and other.carries == kind.carries)
