"""The simulator against laws worked out by hand, and plans against the simulator's counts."""

import math
from fractions import Fraction
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_decoupled.analysis import Costs, Simulation, play, simulate
from ds_decoupled.config import PRESETS
from ds_decoupled.errors import PlanError
from ds_decoupled.schedules import Action, Kind, Placement, Plan, parse_actions

LINKS = [0, 0.1, 0.5, 1, 2, 4]
Lists = list[list[list[Action]]]


def make(stages: int, ranks: int, method: str, k: int, *, hops: tuple[int, int] | None = None,
         split_backward: bool = False) -> Plan:
    axes = PRESETS[method]
    return Plan.make(Placement.of(stages, ranks), hops=hops or axes.hops, k=k, recover=axes.recover, flush=axes.flush,
                     split_backward=split_backward, window=axes.window, sweeps=int(axes.input == "auxnet"))


def read(*ranks: str) -> Lists:
    """One text per rank, one line a tick."""
    return [[parse_actions(line) for line in text.strip("\n").split("\n")] for text in ranks]


# Time per micro-batch


def slowest_circle(ranks: int, link: Fraction, hops: tuple[int, int], split: bool) -> Fraction:
    """The steady state's time per micro-batch by hand: forward 1, backward 3 (2 before its gradient leaves if split).

    A rank's own work takes 4. A circle of waits that goes up n ranks and down again takes n forwards and links up, the
    upper rank's own forward, n backwards and links down, and the lower rank's own backward. It spans a ticks a step up,
    b a step down, and one to the lower rank's next forward. Split, the backward at the foot of the circle is whole
    (its weights' gradients come before the next forward), the n others are not.
    """
    a, b = hops
    leaves = 2 if split else 3
    return max([Fraction(4), *(Fraction(n * (1 + link) + 1 + n * (leaves + link) + 3) / (n * (a + b) + 1)
                               for n in range(1, ranks))])


@pytest.mark.parametrize(("hops", "split", "row"), [
    ((1, 1), False, ["1.000", "1.000", "1.000", "1.000", "1.000", "1.467"]),
    ((0, 1), False, ["1.000", "1.044", "1.219", "1.438", "1.875", "2.750"]),
    ((0, 1), True, ["1.000", "1.000", "1.000", "1.219", "1.656", "2.531"]),
])
def test_time_against_slow_links(hops: tuple[int, int], split: bool, row: list[str]) -> None:
    """Eight ranks, forward 1 and backward 3, links of 0 to 4; times in units of a stage's own work."""
    plan = make(8, 8, "delayed", 1, hops=hops, split_backward=split)
    kinds = {Kind.BACKWARD: 3.0, Kind.LOSS: 4.0}
    times = [simulate(plan, 160, Costs(kinds=kinds, link=link)).time_per_micro_batch for link in LINKS]
    laws = [slowest_circle(8, Fraction(str(link)), hops, split) for link in LINKS]
    assert times == pytest.approx([float(law) for law in laws], abs=1e-9)
    assert [f"{float(law) / 4 + 1e-9:.3f}" for law in laws] == row


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 16])
@pytest.mark.parametrize("stages_a_rank", [1, 2])
def test_1f1b_takes_m_plus_p_minus_1(ranks: int, micro_batches: int, stages_a_rank: int) -> None:
    run = simulate(make(ranks * stages_a_rank, ranks, "backprop", micro_batches), micro_batches)
    assert run.total_time == 3 * stages_a_rank * (micro_batches + ranks - 1)
    assert run.idle == pytest.approx([(ranks - 1) / (micro_batches + ranks - 1)] * ranks)
    assert set(run.updates_crossed) == {0}


@pytest.mark.parametrize("method", ["delayed", "pipedream"])
def test_no_bubble_without_a_flush(method: str) -> None:
    run = simulate(make(4, 4, method, 2), 60)
    assert run.time_per_micro_batch == 3
    assert run.steady_idle == (0, 0, 0, 0)
    assert run.one_rank_time == 12


@pytest.mark.parametrize("k", [1, 4, 16])
def test_petra_against_1f1b_on_two_ranks(k: int) -> None:
    """``3 (1 + (P-1)/k) / 4``, with reconstruction on every stage (the last one included, as a balanced share)."""
    petra = simulate(make(2, 2, "petra", k), 64, Costs(kinds={Kind.LOSS: 4}))
    flush = simulate(make(2, 2, "backprop", k), k)
    assert petra.time_per_micro_batch is not None
    # A PETRA stage takes 1 + 3 units where a stage of backpropagation takes 1 + 2.
    assert flush.total_time / k / petra.time_per_micro_batch == pytest.approx(3 * (1 + 1 / k) / 4)


def test_costs_by_kind_and_by_stage() -> None:
    plan = make(3, 3, "dsp", 1)
    assert simulate(plan, 40).time_per_micro_batch == 4
    assert simulate(plan, 40, Costs(kinds={Kind.RECOMPUTE: 5})).time_per_micro_batch == 6
    assert simulate(plan, 40, Costs(stages={(1, Kind.FORWARD): 4})).time_per_micro_batch == 7
    assert simulate(plan, 40, Costs(kinds={Kind.UPDATE: 1, Kind.LOAD: 0.5})).time_per_micro_batch == 5.5
    halved = make(3, 3, "dsp", 2)
    assert simulate(halved, 60, Costs(kinds={Kind.UPDATE: 1}, link=0)).steady_idle == pytest.approx([0, 0, 1 / 4.5])


def test_split_backward_does_the_same_work() -> None:
    whole, split = (simulate(make(4, 4, "petra", 2, split_backward=flag), 12) for flag in (False, True))
    assert whole.busy == split.busy
    assert (whole.delays, whole.records, whole.traffic) == (split.delays, split.records, split.traffic)


def test_too_short_for_a_steady_state() -> None:
    run = simulate(make(4, 4, "petra", 1), 2)
    assert run.time_per_micro_batch is None and run.steady_idle is None
    assert run.total_time == 3 + 3 + 3 * 3 + 3  # up, loss, down, and the second micro-batch one backward behind


def test_timeline() -> None:
    run = simulate(make(2, 2, "backprop", 1), 1, Costs(link=0.5))
    boxes = [(e.rank, str(e.action), e.start, e.end) for e in run.events if e.end > e.start]
    assert boxes == [(0, "0F0", 0, 1), (0, "0B0", 5, 7), (1, "1X0", 1.5, 4.5)]
    assert run.total_time == 7 and run.busy == (3, 3)


# What is counted


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 30),
       st.sampled_from(["graph", "input", "reconstruct"]), st.booleans(), st.sampled_from([0.0, 0.3, 5.0]), st.data())
def test_delayed_plans(stages: int, a: int, b: int, k: int, micro_batches: int, recover: str, split: bool, link: float,
                       data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, stages))
    plan = Plan.make(Placement.of(stages, ranks), hops=(a, b), k=k, recover=recover, flush=False, split_backward=split)
    run = simulate(plan, micro_batches, Costs(link=link))  # raises on a deadlock
    delays = [(a + b) * (stages - 1 - s) for s in range(stages)]
    assert list(run.delays) == delays
    assert list(run.records) == [min(delay + 1, micro_batches) for delay in delays]
    assert all(crossed <= math.ceil(delay / k) for crossed, delay in zip(run.updates_crossed, delays, strict=True))
    if micro_batches > 2 * (delays[0] + k):
        assert list(run.updates_crossed) == [math.ceil(delay / k) for delay in delays]
    check_actions(plan, micro_batches, k)
    check_traffic(run, plan, micro_batches)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.sampled_from(["graph", "input", "reconstruct"]), st.booleans(),
       st.data())
def test_flush_plans(stages: int, k: int, recover: str, split: bool, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, stages))
    plan = Plan.make(Placement.of(stages, ranks), hops=(0, 1), k=k, recover=recover, flush=True, split_backward=split)
    run = simulate(plan, k)
    rank_of_stage = plan.placement.rank_of_stage
    assert list(run.delays) == [ranks - 1 - rank for rank in rank_of_stage]
    assert list(run.records) == [min(ranks - rank, k) for rank in rank_of_stage]
    assert set(run.updates_crossed) == {0}
    check_actions(plan, k, k)
    check_traffic(run, plan, k)


def check_actions(plan: Plan, micro_batches: int, k: int) -> None:
    """Every stage meets every micro-batch once on its way forward, once back, and updates after each k."""
    stages = plan.placement.stages
    ranks = [list(chain(*plan.run(rank, micro_batches))) for rank in range(plan.placement.ranks)]
    done = [action for rank in ranks for action in rank]
    assert len(set(done)) == len(done)
    for s in range(stages):
        by_kind: dict[Kind, list[int]] = {}
        for action in done:
            if action.stage == s:
                by_kind.setdefault(action.kind, []).append(action.micro_batch)
        every = list(range(micro_batches))
        if s == stages - 1:
            assert by_kind[Kind.LOSS] == every and Kind.FORWARD not in by_kind
        else:
            back = [numbers for kind, numbers in by_kind.items() if kind.is_backward]
            assert by_kind[Kind.FORWARD] == every and back == [every]
        assert by_kind.get(Kind.UPDATE, []) == list(range(micro_batches // k))
        assert by_kind.get(Kind.LOAD, []) == (every if s == 0 else [])


def check_traffic(run: Simulation, plan: Plan, micro_batches: int) -> None:
    """One message up and one down per micro-batch where two ranks meet; with a reconstruction it is twice as large."""
    ranks = plan.placement.rank_of_stage
    back = 2 if plan.recover == "reconstruct" else 1
    expected = [entry for s in range(plan.placement.stages - 1) if ranks[s] != ranks[s + 1]
                for entry in ((s, "forward", micro_batches, micro_batches),
                              (s, "backward", micro_batches, back * micro_batches))]
    assert [(t.link, t.direction, t.messages, t.bytes) for t in run.traffic] == expected


def test_bytes_are_in_the_size_given() -> None:
    run = simulate(make(2, 2, "petra", 1), 3, Costs(message_bytes=100))
    assert [(t.direction, t.messages, t.bytes) for t in run.traffic] == [("forward", 3, 300), ("backward", 3, 600)]


# Plans that cannot run


def test_deadlock_prints_the_staircase_with_the_cells_that_wait() -> None:
    broken = read("0L0 0F0 0SA0\n0L1 0F1\n0RG0 0B0", "1RA0 1X0 1SG0\n1RA1 1X1 1SG1\n")
    broken[0][2] = parse_actions("0RG0 0B0 0RG1 0B1")
    with pytest.raises(PlanError) as error:
        play(broken, (0, 1, 2))
    assert str(error.value) == """\
deadlock: every rank that is not done waits for a message
rank 0 waits for 0RG1 in tick 2 (gradient of micro-batch 1), sent by nobody yet: rank 1 sends 1SG1 in tick 1
rank 1 waits for 1RA1 in tick 1 (activation of micro-batch 1), sent by nobody
       rank 0  | rank 1
tick   stage 0 | stage 1
   0   F0      | X0
   1   F1      | >X1<
   2   >B0 B1< |"""


def test_two_ranks_that_wait_for_each_other() -> None:
    with pytest.raises(PlanError, match=r"rank 0 waits for 0RG0 in tick 0 .* rank 1 sends 1SG0 in tick 0"):
        play(read("0L0 0F0 0RG0 0B0 0SA0", "1RA0 1X0 1SG0"), (0, 1, 2))


@pytest.mark.parametrize(("ranks", "why"), [
    (("0L0 0F0 0SA0 0L1 0F1 0SA1", "1RA1 1X1"), "rank 1, tick 0: 1RA1 cannot run: the next message on link 0 forward "
                                                "is a SA of micro-batch 0"),
    (("0L0 0F0 0SA0 0RR0 0R0", "1RA0 1X0 1SG0"), "0RR0 cannot run: the next message on link 0 backward is a SG"),
    (("0F0",), "0F0 cannot run: the micro-batch has not been loaded"),
    (("0L0 0F0 1F1",), "1F1 cannot run: the stage's input is not there"),
    (("0L0 0F0 0B0",), "0B0 cannot run: the gradient of the stage's output is not there"),
    (("0L0 0F0 1X0 0B0 0B0",), "0B0 cannot run: the gradient of the stage's output is not there"),
    (("0L0 0F0 1X0 0B0 0U1",), "0U1 cannot run: the stage's next update is number 0"),
    (("0L0 0F0 1X0 0B0 0U0 0W0",), "0U0 cannot run: weights' gradients that were put off are still missing"),
    (("0L0 0F0 1X0 0W0 0B0",), "0W0 cannot run: the backward pass has not run"),
    (("0L0 0F0 0SA0",), "0SA0 cannot run: no link between two ranks there"),
    (("0L0 0SA0", "1RA0"), "0SA0 cannot run: what it sends has not been computed"),
    (("0L0 0F0 0SA0 0RG0 0B0", "1RA0 1SG0 1X0"), "1SG0 cannot run: what it sends has not been computed"),
    (("0L0 0F0 5X0",), "5X0 cannot run: stage 5 is not on this rank"),
    (("1X0", "0F0"), "rank 0, tick 0: 1X0 cannot run: stage 1 is not on this rank"),
    (("0L0 0F0 0SA0", "1U0"), "1 messages on link 0 forward were never received, the first of micro-batch 0"),
    (("0L0 0F0 1X0",), "stage 0 never ran micro-batch 0 backward"),
    (("0L0 0F0",), "rank 0 ends with the activation of stage 0 that nobody used: micro-batch 0"),
    (("0L3",), "rank 0 ends with a loaded micro-batch of stage 0 that nobody used: micro-batch 3"),
])
def test_broken_plans(ranks: tuple[str, ...], why: str) -> None:
    with pytest.raises(PlanError) as error:
        play(read(*ranks), (0, 1, 2) if len(ranks) == 2 else (0, 2))
    assert why in str(error.value)


def test_the_staircase_of_an_error_shows_the_bad_cell_alone() -> None:
    plan = make(4, 4, "petra", 1)
    lists = [list(plan.run(rank, 30)) for rank in range(4)]
    lists[2][9] = [action for action in lists[2][9] if action.kind is not Kind.SEND_ACTIVATION]
    with pytest.raises(PlanError) as error:
        play(lists, plan.placement.rank_bounds)
    lines = str(error.value).splitlines()
    assert lines[0] == ("rank 3, tick 10: 3RA7 cannot run: the next message on link 2 forward is a SA of micro-batch 8")
    assert [line for line in lines if ">" in line] == ["  10   F10 R4  | F9 R5   | F8 R6   | >X7<"]
    assert lines[3].split()[0] == "6" and lines[-1].split()[0] == "12"


def test_lists_for_other_ranks() -> None:
    with pytest.raises(PlanError, match="1 lists of actions for 2 ranks"):
        play([[]], (0, 1, 2))


# Stage-local losses


@given(stages=st.integers(1, 6), ranks=st.integers(1, 6), window=st.integers(1, 6), farthest=st.booleans(),
       hops=st.sampled_from([(0, 1), (1, 1), (1, 2), (2, 1)]))
@settings(max_examples=60, deadline=None)
def test_windows(stages: int, ranks: int, window: int, farthest: bool, hops: tuple[int, int]) -> None:
    """No deadlock, nothing left over; delays are (a+b) min(n-1, J-1-s), and at most n-1 gradients go down a link."""
    ranks, window = min(ranks, stages), min(window, stages)
    plan = Plan.make(Placement.of(stages, ranks), hops=hops, k=1, recover="graph", flush=False, window=window,
                     farthest=farthest)
    run = simulate(plan, 12)
    assert run.delays == tuple(sum(hops) * min(window - 1, stages - 1 - s) for s in range(stages))
    assert run.delays == tuple(plan.ticks.delay(s) for s in range(stages))
    down = [t for t in run.traffic if t.direction == "backward"]
    assert all(t.messages <= 12 * (window - 1) for t in down)
    if not farthest:
        expected = {link: 12 * min(window - 1, stages - 1 - link) for link in range(stages - 1)}
        assert all(t.messages == expected[t.link] for t in down)


def test_greedy_learning_has_no_bubble() -> None:
    plan = make(4, 4, "dgl", 1)
    assert simulate(plan, 40, Costs(link=3)).time_per_micro_batch == 3
