"""The replay ring: its rule against a slow list, what it holds, and what it says of itself."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from async_oracle import SlowBuffer
from hypothesis import given
from hypothesis import strategies as st

from ds_decoupled.errors import LinkError
from ds_decoupled.links import Message, ReplayRing
from ds_decoupled.schedules.replay import Replay, ReplayOrder
from ds_decoupled.schedules.turns import Clock

CPU = torch.device("cpu")


@given(size=st.integers(1, 5), cap=st.none() | st.integers(1, 3), oldest=st.booleans(),
       puts=st.lists(st.booleans(), max_size=60))
def test_the_rule(size: int, cap: int | None, oldest: bool, puts: list[bool]) -> None:
    """Against a list that is looked through from its beginning; and after every step saved and loaded again."""
    order, slow = ReplayOrder(Replay(size, cap, oldest)), SlowBuffer(size, cap, oldest)
    number = 0
    for put in puts:
        if put:
            order.put(number)
            slow.put(number)
            number += 1
        else:
            can_draw, drawn = order.can_draw, order.draw()
            assert drawn == slow.take() and can_draw == (drawn is not None)
            assert order.report(1)["uses"] == _uses(slow)
        again = ReplayOrder(Replay(size, cap, oldest))
        again.load_state_dict(order.state_dict())
        order = again
        assert list(order.uses.items()) == [tuple(entry) for entry in slow.entries]
        assert order.unseen == sum(uses == 0 for _, uses in slow.entries) and (order.unseen > 0) == slow.unseen
    assert order.report(1)["overwritten_unseen"] == slow.gone.count(0)


def _uses(slow: SlowBuffer) -> dict[str, int]:
    counted = Counter([*slow.gone, *(uses for _, uses in slow.entries)])
    return {str(n): counted[n] for n in sorted(counted)}


def message(number: int) -> Message:
    return Message(number, ((torch.full((2, 3), float(number)), torch.ones(4)), torch.tensor([number])))


def test_messages_come_whole() -> None:
    ring = ReplayRing(Replay(size=2), CPU, CPU)
    with pytest.raises(LinkError, match="stage 1: the replay ring has nothing"):
        ring.recv(0, "stage 1")
    for number in range(3):
        ring.send(message(number))
    taken = [ring.recv(0, "stage 1") for _ in range(3)]
    assert [m.micro_batch for m in taken] == [2, 1, 2]
    (x, ones), labels = taken[1].parts
    assert torch.equal(x, torch.full((2, 3), 1.0)) and torch.equal(ones, torch.ones(4)) and labels.tolist() == [1]
    assert ring.nbytes == 2 * (6 * 4 + 4 * 4 + 8)
    assert ring.report(k=2) == {"uses": {"0": 1, "1": 1, "2": 1}, "overwritten_unseen": 1, "bytes": 96,
                                "age": {"mean": 1 / 3 / 2, "max": 0.5}}


def test_a_ring_is_saved_with_what_it_holds() -> None:
    ring, again = (ReplayRing(Replay(size=3), CPU, CPU) for _ in range(2))
    for number in range(4):
        ring.send(message(number))
        ring.recv(0, "")
    again.load_state_dict(ring.state_dict())
    for _ in range(5):
        a, b = ring.recv(0, ""), again.recv(0, "")
        assert a.micro_batch == b.micro_batch and torch.equal(a.parts[0][0], b.parts[0][0])


def test_memory_of_the_host() -> None:
    """Where it lies is another device than where it is used."""
    ring = ReplayRing(Replay(size=2), torch.device("meta"), CPU)
    ring.send(message(0))
    assert ring.state_dict()["messages"][0][1][1].device.type == "meta"


def test_weights_of_draws() -> None:
    """Slowed by S = 1/(1 - noise), a stage has that much less of all turns."""
    turns = Clock(seed=1, slow_down=(1.0, 2.0, 1.0)).turns(3)
    counted = Counter(turns.next() for _ in range(20_000))
    assert counted[1] / counted[0] == pytest.approx(0.5, abs=0.02) and counted[2] / counted[0] == pytest.approx(1, abs=0.03)


def test_durations() -> None:
    turns = Clock(durations=(2.0, 1.0, 1.0), slow_down=(1.0, 1.0, 4.0)).turns(3)
    for stage in range(3):
        turns.acted(stage)
    acted = []
    for _ in range(8):
        acted.append(turns.next())
        turns.acted(acted[-1])
    assert acted == [1, 0, 1, 1, 0, 1, 2, 1]
