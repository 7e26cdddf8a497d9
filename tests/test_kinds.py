"""Every kind of action that computes has a cost, a colour and words, and is seen in the staircase and in the picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ds_decoupled import instructions
from ds_decoupled.analysis.pictures import timeline
from ds_decoupled.analysis.simulate import simulate
from ds_decoupled.analysis.simulation import Costs, Event, Simulation
from ds_decoupled.analysis.staircase import legend, staircase
from ds_decoupled.config import PRESETS
from ds_decoupled.schedules import KINDS, Action, Kind, Placement, Plan
from ds_decoupled.schedules.kinds import add_kind

COMPUTING = [kind for kind in KINDS.values() if kind.computes]


def colours(svg: Path) -> list[str]:
    """Of all that is filled: boxes, and the legend's patches."""
    return re.findall(r"fill: (#[0-9a-f]{6})", svg.read_text())


@pytest.mark.parametrize("kind", COMPUTING, ids=lambda kind: kind.name)
def test_every_kind(kind: Kind, tmp_path: Path) -> None:
    assert Costs().of(0, kind) == kind.cost and instructions.instruction_class(kind).__name__ == kind.name
    assert sum(row.colour == kind.colour for row in COMPUTING) == 1, "two kinds look alike"
    event = Event(0, 0, Action(0, kind, 7), 0.0, 2.0)
    timeline(Simulation(1, 2.0, None, (2.0,), (0,), (0,), (1,), (), (event,)), tmp_path / "a.svg")
    assert colours(tmp_path / "a.svg").count(kind.colour) == 2  # the box and the legend
    # as matplotlib writes it into the comment beside a text's outlines
    assert f"<!-- {kind.words} -->" in (tmp_path / "a.svg").read_text().replace("&apos;", "'")
    if kind.in_cells:
        assert f"{kind.letter}7" in staircase([[[Action(0, kind, 7)]]], (0, 1))
        assert legend({kind})[0].startswith(f"{kind.letter} ")


def test_a_row_that_is_taken_is_refused() -> None:
    for row in (Kind("B", "Else", "something else"), Kind("Y", "Backward", "something else"),
                Kind("Y", "Else", "something else", colour=Kind.BACKWARD.colour), Kind("y", "Else", "something else")):
        with pytest.raises(ValueError, match="action kind"):
            add_kind(row)
    assert "Y" not in KINDS


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("stages, ranks", [(1, 1), (5, 2), (4, 4)])
@pytest.mark.parametrize("window", [0, 3])
def test_every_action_of_every_method_is_drawn(name: str, stages: int, ranks: int, window: int, tmp_path: Path) -> None:
    axes = PRESETS[name]
    plan = Plan.make(Placement.of(stages, ranks), hops=axes.hops, k=2, recover=axes.recover, flush=axes.flush,
                     window=axes.window and (window or axes.window),
                     split_backward=axes.gradient == "global" and not axes.flush and not window,
                     sweeps=(axes.input == "auxnet") * (window or 1))
    run = simulate(plan, 2)
    timeline(run, tmp_path / "a.svg")
    drawn = [event.action.kind for event in run.events if event.end > event.start]
    seen = colours(tmp_path / "a.svg")
    for kind in set(drawn):
        assert seen.count(kind.colour) == drawn.count(kind) + 1, kind
