"""Layers to stages, stages to ranks: against brute force."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_decoupled.schedules import Placement, balanced_bounds, uniform_bounds


def brute_force(weights: list[int], parts: int) -> tuple[int, int]:
    """The best (heaviest run, sum of squares) over every cut."""
    n = len(weights)
    cuts = ([0, *inner, n] for inner in combinations(range(1, n), parts - 1))
    return min(measure(weights, bounds) for bounds in cuts)


def measure(weights: list[int], bounds: list[int]) -> tuple[int, int]:
    runs = [sum(weights[a:b]) for a, b in pairwise(bounds)]
    return max(runs), sum(run**2 for run in runs)


@st.composite
def layers_and_parts(draw: st.DrawFn) -> tuple[list[int], int]:
    weights = draw(st.lists(st.integers(0, 12), min_size=1, max_size=9))
    return weights, draw(st.integers(1, len(weights)))


@given(layers_and_parts())
def test_balanced_is_the_best_cut(case: tuple[list[int], int]) -> None:
    weights, parts = case
    bounds = balanced_bounds(weights, parts)
    assert bounds[0] == 0 and bounds[-1] == len(weights) and len(bounds) == parts + 1
    assert all(a < b for a, b in pairwise(bounds))
    assert measure(weights, bounds) == brute_force(weights, parts)


@given(layers_and_parts(), st.integers(0, 9), st.integers(0, 3))
def test_what_runs_weigh_beside_their_items(case: tuple[list[int], int], more: int, slope: int) -> None:
    """All but the last one weigh more, which depends on the run's number and on where it ends."""
    weights, parts = case

    def beside(part: int, end: int) -> int:
        return max(0, more - slope * part) + end % 2

    def measured(bounds: list[int]) -> tuple[int, int]:
        runs = [sum(weights[a:b]) + (0 if b == len(weights) else beside(part, b))
                for part, (a, b) in enumerate(pairwise(bounds))]
        return max(runs), sum(run**2 for run in runs)

    cuts = ([0, *inner, len(weights)] for inner in combinations(range(1, len(weights)), parts - 1))
    assert measured(balanced_bounds(weights, parts, beside=beside)) == min(map(measured, cuts))


def test_a_lighter_beginning_may_be_less_even() -> None:
    """8 is the heaviest run whatever the rest does, so that the rest is free to be even: 7, 2, 4, not 1, 6, 6."""
    assert balanced_bounds([1, 6, 2, 4, 8], 4) == [0, 2, 3, 4, 5]


@pytest.mark.parametrize(("items", "parts"), [(0, 1), (3, 4), (3, 0)])
def test_balanced_refuses_empty_runs(items: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"cannot cut {items} items into {parts} non-empty parts"):
        balanced_bounds([1.0] * items, parts)


@given(st.integers(1, 40), st.data())
def test_uniform_runs_differ_by_one(items: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, items))
    sizes = [b - a for a, b in pairwise(uniform_bounds(items, parts))]
    assert sum(sizes) == items and len(sizes) == parts and max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_placement() -> None:
    placement = Placement(stage_bounds=(0, 3, 4, 6, 9), rank_bounds=(0, 1, 4))
    assert (placement.stages, placement.ranks) == (4, 2)
    assert placement.rank_of_stage == (0, 1, 1, 1)
    assert [list(placement.stages_of(r)) for r in range(2)] == [[0], [1, 2, 3]]
    assert list(placement.layers_of(2)) == [4, 5]
    assert placement.rank_layer_bounds == [0, 3, 9]


def test_placement_of_one_layer_a_stage() -> None:
    assert Placement.of(5, 2) == Placement((0, 1, 2, 3, 4, 5), (0, 2, 5))


def test_the_last_run_may_weigh_less() -> None:
    """Recomputing stages cost 4, the last one 3: seven layers in two stages are cut after the third, not the fourth."""
    assert balanced_bounds([4] * 7, 2) in ([0, 3, 7], [0, 4, 7])
    assert balanced_bounds([4] * 7, 2, last=[3] * 7) == [0, 3, 7]
    assert balanced_bounds([4, 4, 4, 4], 1, last=[1, 1, 1, 1]) == [0, 4]
