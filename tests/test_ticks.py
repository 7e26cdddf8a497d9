"""In which tick a stage meets a micro-batch: drawn tables, and the laws of the delay."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_decoupled.analysis import staircase
from ds_decoupled.schedules import Placement, Plan, Ticks, ticks


def draw(stages: int, ranks: int, hops: tuple[int, int], rows: int, *, k: int = 1, recover: str = "graph",
         updates: bool = False, micro_batches: int = 50, window: int = 0) -> str:
    plan = Plan.make(Placement.of(stages, ranks), hops=hops, k=k, recover=recover, flush=False,
                     window=window)
    lists = [list(plan.run(rank, micro_batches)) for rank in range(ranks)]
    return staircase(lists, plan.placement.rank_bounds, ticks=rows, updates=updates)


def test_the_table_in_the_docstring_is_true() -> None:
    assert ticks.__doc__ is not None
    first, second = ("\n".join(line[4:] for line in part.split("\n\n")[0].rstrip().splitlines())
                     for part in ticks.__doc__.split("::\n\n")[1:])
    assert draw(3, 1, (1, 1), 5) == first
    assert draw(4, 1, (0, 1), 2, window=2) == second


def test_petra() -> None:
    assert draw(4, 2, (1, 1), 9, k=2, recover="reconstruct", updates=True) == """\
       rank 0            | rank 1
tick   stage 0   stage 1 | stage 2   stage 3
   0   F0                |
   1   F1        F0      |
   2   F2        F1      | F0
   3   F3        F2      | F1        X0
   4   F4        F3      | F2 R0     X1*
   5   F5        F4 R0   | F3 R1*    X2
   6   F6 R0     F5 R1*  | F4 R2     X3*
   7   F7 R1*    F6 R2   | F5 R3*    X4
   8   F8 R2     F7 R3*  | F6 R4     X5*"""


def test_asynchronous_1f1b_has_half_the_delay() -> None:
    assert draw(4, 4, (0, 1), 6) == """\
       rank 0  | rank 1  | rank 2  | rank 3
tick   stage 0 | stage 1 | stage 2 | stage 3
   0   F0      | F0      | F0      | X0
   1   F1      | F1      | F1 B0   | X1
   2   F2      | F2 B0   | F2 B1   | X2
   3   F3 B0   | F3 B1   | F3 B2   | X3
   4   F4 B1   | F4 B2   | F4 B3   | X4
   5   F5 B2   | F5 B3   | F5 B4   | X5"""


def test_slow_way_down() -> None:
    assert draw(3, 1, (0, 2), 6, recover="input") == """\
tick   stage 0   stage 1   stage 2
   0   F0        F0        X0
   1   F1        F1        X1
   2   F2        F2 C0     X2
   3   F3        F3 C1     X3
   4   F4 C0     F4 C2     X4
   5   F5 C1     F5 C3     X5"""


def test_a_run_drains() -> None:
    assert draw(3, 3, (1, 1), 99, micro_batches=2) == """\
       rank 0  | rank 1  | rank 2
tick   stage 0 | stage 1 | stage 2
   0   F0      |         |
   1   F1      | F0      |
   2           | F1      | X0
   3           | B0      | X1
   4   B0      | B1      |
   5   B1      |         |"""


@pytest.mark.parametrize(("hops", "delays"), [((1, 1), [6, 4, 2, 0]), ((0, 1), [3, 2, 1, 0]), ((2, 1), [9, 6, 3, 0])])
def test_delay(hops: tuple[int, int], delays: list[int]) -> None:
    assert [Ticks.delayed(4, hops).delay(s) for s in range(4)] == delays


@given(st.integers(1, 20), st.integers(0, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 50))
def test_laws(stages: int, a: int, b: int, k: int, m: int) -> None:
    t = Ticks.delayed(stages, (a, b))
    for s in range(stages):
        delay = (a + b) * (stages - 1 - s)
        assert t.forward(s, m) == m + a * s
        assert t.backward(s, m) == m + a * (stages - 1) + b * (stages - 1 - s)
        assert (t.delay(s), t.records(s), t.updates_crossed(s, k)) == (delay, delay + 1, math.ceil(delay / k))
    assert t.drain == (a + b) * (stages - 1)


def test_under_a_flush_a_message_hops_between_ranks_alone() -> None:
    t = Ticks.flush((0, 0, 0, 1, 1))
    assert [t.forward(s, 0) for s in range(5)] == [0] * 5
    assert [t.backward(s, 0) for s in range(5)] == [1, 1, 1, 0, 0]
    assert t.stages == 5
