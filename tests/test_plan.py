"""Plans as text: golden files, one per preset. ``python tests/test_plan.py`` writes them anew; then read the diff."""

from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_decoupled.config import PRESETS
from ds_decoupled.schedules import Action, Kind, Placement, Plan, add_communication, format_actions, parse_actions
from ds_decoupled.schedules.asynchronous import AsynchronousOrder, OwnPace
from ds_decoupled.schedules.replay import Replay

GOLDEN = Path(__file__).parent / "golden"
STAGES, RANKS = 4, 2
#: Threads that go through the whole model have no plan for ranks.
OF_TICKS = [name for name, axes in PRESETS.items() if not axes.layerwise]


def preset_plan(method: str, placement: Placement, k: int) -> Plan:
    axes = PRESETS[method]
    return Plan.make(placement, hops=axes.hops, k=k, recover=axes.recover, flush=axes.flush, window=axes.window,
                     sweeps=2 * (axes.input == "auxnet"))


def golden_plan(method: str) -> tuple[Plan, int]:
    """The plan, and the micro-batches of its run: one batch of k = 4 under a flush, eight with k = 2 otherwise."""
    k, micro_batches = (4, 4) if PRESETS[method].flush else (2, 8)
    return preset_plan(method, Placement.of(STAGES, RANKS), k), micro_batches


def golden_steps(method: str) -> tuple[str, list[list[list[Action]]]]:
    """What a step is, and every rank's steps: ticks of the plan; or calls on the virtual clock, with rings of 2."""
    plan, micro_batches = golden_plan(method)
    if PRESETS[method].pace == "ticks":
        return "tick", [list(plan.run(rank, micro_batches)) for rank in range(RANKS)]
    order, ranks = AsynchronousOrder(plan, OwnPace(Replay(size=2))), plan.placement.rank_of_stage
    calls = [*(list(order.call()) for _ in range(micro_batches)), list(order.drain())]
    return "call", [[[a for a in actions if ranks[a.stage] == rank] for actions in calls] for rank in range(RANKS)]


def golden_text(method: str) -> str:
    step, by_rank = golden_steps(method)
    lines = [f"rank {rank} {step} {number}: {format_actions(actions)}".rstrip()
             for rank, steps in enumerate(by_rank) for number, actions in enumerate(steps)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("method", OF_TICKS)
def test_golden(method: str) -> None:
    """The text is the generated plan's, and reads back into the very same actions."""
    text = (GOLDEN / f"{method}.txt").read_text()
    assert text == golden_text(method)
    read: dict[tuple[int, int], list[Action]] = {}
    for line in text.splitlines():
        head, _, actions = line.partition(":")
        words = head.split()
        read[int(words[1]), int(words[3])] = parse_actions(actions)
    for rank, steps in enumerate(golden_steps(method)[1]):
        assert steps == [read[r, t] for r, t in read if r == rank]


def test_no_golden_file_without_a_preset() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(OF_TICKS)


def test_a_tick_of_petra() -> None:
    """Rank 1 of two, stages 2 and 3: what leaves goes first, what is needed comes right before its use."""
    plan = preset_plan("petra", Placement.of(4, 2), 2)
    assert format_actions(plan.tick(1, 7, 99)) == "3X4 2RA5 2F5 2R3 2SR3 2U1"
    assert format_actions(plan.tick(0, 7, 99)) == "1F6 1SA6 0L7 0F7 0R1 0U0 1RR2 1R2"


def test_a_tick_of_1f1b() -> None:
    plan = preset_plan("backprop", Placement.of(4, 2), 2)
    assert format_actions(plan.tick(0, 1, 2)) == "0L1 0F1 1F1 1SA1 1RG0 1B0 0B0"
    assert format_actions(plan.tick(1, 1, 2)) == "2RA1 2F1 3X1 3U0 2B1 2SG1 2U0"


def test_split_backward_puts_the_weights_behind_the_send() -> None:
    """Only where a gradient goes to another rank: a neighbour on the same rank does not wait."""
    plan = Plan.make(Placement.of(4, 2), hops=(1, 1), k=2, recover="input", flush=False, split_backward=True)
    assert format_actions(plan.tick(1, 7, 99)) == "3X4 2RA5 2F5 2C3 2SG3 2W3 2U1"
    assert format_actions(plan.tick(0, 7, 99)) == "1F6 1SA6 0L7 0F7 0C1 0U0 1RG2 1C2"
    last = Plan.make(Placement.of(2, 2), hops=(0, 1), k=1, recover="graph", flush=False, split_backward=True)
    assert format_actions(last.tick(1, 3, 99)) == "1RA3 1X3 1SG3 1W3 1U3"


def test_communication_is_only_between_ranks() -> None:
    actions = parse_actions("0F0 1F0 2X0 1B0 0B0")
    assert list(add_communication(actions, (0, 0, 0))) == actions
    assert format_actions(add_communication(
        parse_actions("1F0 1C0 1U0"), (0, 1, 2), gradient_kind=lambda below, _: Kind.SEND_RECONSTRUCTION if below == 0
        else Kind.SEND_GRADIENT)) == "1RA0 1F0 1SA0 1RG0 1C0 1SR0 1U0"


def test_who_wants_its_output_back() -> None:
    placement = Placement.of(4, 4)
    assert preset_plan("petra", placement, 1).wants_output == {0, 1, 2}
    assert preset_plan("dsp", placement, 1).wants_output == frozenset()
    mixed = Plan.make(placement, hops=(1, 1), k=1, recover="reconstruct", flush=False, wants_output=frozenset({1}))
    kinds = [{a.kind.letter for a in chain(*mixed.run(rank, 3)) if a.kind.is_send or a.kind.is_recv}
             for rank in range(4)]
    assert kinds == [{"SA", "RG"}, {"RA", "SA", "RR", "SG"}, {"RA", "SA", "RG", "SR"}, {"RA", "SG"}]


@given(st.integers(1, 8), st.integers(0, 2), st.integers(1, 2), st.integers(1, 4), st.integers(1, 12), st.data())
def test_a_stage_does_the_same_on_any_number_of_ranks(stages: int, a: int, b: int, k: int, micro_batches: int,
                                                      data: st.DataObject) -> None:
    """Placement invariance: under a delayed update, each stage's own computation, tick by tick."""
    def by_stage(ranks: int) -> dict[tuple[int, int], list[Action]]:
        plan = Plan.make(Placement.of(stages, ranks), hops=(a, b), k=k, recover="input", flush=False)
        done: dict[tuple[int, int], list[Action]] = {}
        for rank in range(ranks):
            for tick, actions in enumerate(plan.run(rank, micro_batches)):
                for action in actions:
                    if not (action.kind.is_send or action.kind.is_recv):
                        done.setdefault((action.stage, tick), []).append(action)
        return done

    assert by_stage(data.draw(st.integers(1, stages))) == by_stage(1)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_updates_follow_each_kth_backward(k: int) -> None:
    plan = preset_plan("delayed", Placement.of(3, 1), k)
    for stage in range(3):
        mine = [a for a in chain(*plan.run(0, 12)) if a.stage == stage and (a.kind is Kind.UPDATE or a.kind is Kind.LOSS
                                                                            or a.kind.is_backward)]
        for number, start in enumerate(range(0, len(mine), k + 1)):
            group = mine[start:start + k + 1]
            assert [a.micro_batch for a in group] == [*range(number * k, number * k + k), number]
            assert [a.kind is Kind.UPDATE for a in group] == [False] * k + [True]


def test_a_run_without_micro_batches_does_nothing() -> None:
    assert not any(chain(*preset_plan("petra", Placement.of(3, 1), 1).run(0, 0)))


if __name__ == "__main__":
    for name in OF_TICKS:
        (GOLDEN / f"{name}.txt").write_text(golden_text(name))
