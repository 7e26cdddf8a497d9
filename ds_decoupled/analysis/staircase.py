"""A plan as a table: one row a tick, one column a stage, ranks side by side.

The paper's PETRA on three stages and one rank (``B`` a backward pass, ``X`` the last stage's forward and backward)::

    tick   stage 0   stage 1   stage 2
       0   F0
       1   F1        F0
       2   F2        F1        X0
       3   F3        F2 B0     X1
       4   F4 B0     F3 B1     X2
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import pairwise

from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import KINDS, Kind

UPDATE_MARK = "*"

#: Every rank's list: ``lists[rank][tick]`` are the actions in order, as :meth:`Plan.run` gives them.
Lists = Sequence[Sequence[Sequence[Action]]]


def legend(kinds: Set[Kind]) -> list[str]:
    """What the letters of ``kinds`` in a cell mean, and the mark of an update."""
    told = [f"{kind.letter} {kind.words}" for kind in KINDS.values() if kind in kinds and _in_cells(kind)]
    return [*told, f"{UPDATE_MARK} {Kind.UPDATE.words} follows"]


def _in_cells(kind: Kind) -> bool:
    return kind.computes and kind.in_cells


def staircase(lists: Lists, rank_bounds: Sequence[int], *, first: int = 0, ticks: int | None = None,
              updates: bool = False, marked: Set[tuple[int, int]] = frozenset()) -> str:
    """Draw what every stage computes in every tick.

    Args:
        lists: ``lists[rank][tick]``: the actions in order; sends, receives and loads are not drawn.
        rank_bounds: P+1 stage indices at which ranks begin.
        first: the first tick to draw.
        ticks: how many to draw; all by default.
        updates: put ``*`` behind a cell in which the stage's optimizer steps.
        marked: ``(tick, stage)`` cells to put between ``>`` and ``<``.

    Returns:
        Lines without trailing blanks; with more than one rank a line of ranks comes first.
    """
    stages = rank_bounds[-1]
    length = max((len(rank) for rank in lists), default=0)
    stop = length if ticks is None else min(length, first + ticks)
    rows = [[_cell(lists, rank, tick, stage, updates, (tick, stage) in marked)
             for rank, (begin, end) in enumerate(pairwise(rank_bounds)) for stage in range(begin, end)]
            for tick in range(first, stop)]
    heads = [f"stage {s}" for s in range(stages)]
    width = max(map(len, [*heads, *(cell for row in rows for cell in row)]))

    def line(left: str, cells: Sequence[str]) -> str:
        ranks = ["   ".join(cell.ljust(width) for cell in cells[begin:end]) for begin, end in pairwise(rank_bounds)]
        return f"{left:>4}   {' | '.join(ranks)}".rstrip(" ")

    lines = [line("tick", heads), *(line(str(first + i), row) for i, row in enumerate(rows))]
    if len(rank_bounds) > 2:
        over = [""] * stages
        for rank, begin in enumerate(rank_bounds[:-1]):
            over[begin] = f"rank {rank}"
        lines.insert(0, line("", over))
    return "\n".join(lines)


def _cell(lists: Lists, rank: int, tick: int, stage: int, updates: bool, marked: bool) -> str:
    actions = [a for a in lists[rank][tick] if a.stage == stage] if tick < len(lists[rank]) else []
    text = " ".join(f"{a.kind.letter}{a.micro_batch}" for a in actions if _in_cells(a.kind))
    if updates and any(a.kind is Kind.UPDATE for a in actions):
        text += UPDATE_MARK
    return f">{text}<" if marked else text
