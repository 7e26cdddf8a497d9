"""What the analysis says of every kind of action that computes: words, colour and cost, one row a kind.

The staircase, the picture and the simulator read this table and no other: a kind without a row is an error at import, not a
blank in a picture.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_decoupled.schedules.actions import Kind


@dataclass(frozen=True, slots=True)
class Row:
    """One kind.

    Attributes:
        words: what it does, for legends.
        colour: of its boxes in pictures.
        cost: in units of one stage's forward pass: a backward pass costs two, one to its input alone one, a forward pass run
            again one more; heads cost nothing here.
        in_cells: whether the staircase writes it; loads are not drawn there, and updates are a mark.
    """

    words: str
    colour: str
    cost: float
    in_cells: bool = True


ROWS: dict[Kind, Row] = {
    Kind.LOAD: Row("load the micro-batch", "#e8e4d8", 0, in_cells=False),
    Kind.FORWARD: Row("forward", "#8fb8de", 1),
    Kind.LOSS: Row("forward, loss and backward", "#b8a1d9", 3),
    Kind.HEAD: Row("forward, own loss and its gradient to the input", "#5f93c4", 2),
    Kind.RELAY: Row("gradient of a loss above, passed on", "#d7e39a", 1),
    Kind.BACKWARD: Row("backward through the kept graph", "#8cc9a1", 2),
    Kind.RECOMPUTE: Row("backward by recomputation", "#f2c079", 3),
    Kind.RECONSTRUCT: Row("backward by reconstruction", "#e59a8f", 3),
    Kind.WEIGHTS: Row("weights' gradients, behind the send", "#c9c9c9", 1),
    Kind.UPDATE: Row("the stage's update", "#6e6e6e", 0, in_cells=False),
}

COMPUTING = tuple(kind for kind in Kind if not (kind.is_send or kind.is_recv))
"""Kinds of actions that take a rank's time; the others move messages."""

if set(ROWS) != set(COMPUTING):
    raise AssertionError(f"analysis/kinds.py lacks a row for {sorted(kind.name for kind in set(COMPUTING) ^ set(ROWS))}")
