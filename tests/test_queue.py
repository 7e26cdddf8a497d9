"""``queue``: how far a rank runs ahead of the next where nothing comes back from it."""

from __future__ import annotations

import time
from typing import Any

import engine_cases
import pytest
import torch
import torch.distributed as dist
import worlds
from nets import batches

from ds_decoupled.errors import LinkError
from ds_decoupled.links import Codecs, Message, RemoteReceiver, RemoteSender


def send_until_full(queue: int) -> int:
    """A link alone: how many messages go out before the other side has taken any, and that the next waits for room."""
    dist.init_process_group("gloo")
    group = dist.new_group([0, 1])
    cpu = torch.device("cpu")
    if dist.get_rank() == 0:
        sender = RemoteSender(1, group, cpu, Codecs(), timeout=0.5, queue=queue)
        sent = 0
        with pytest.raises(LinkError, match="did not take a message within 0.5 s"):
            for m in range(100):
                sender.send(Message(m, (torch.tensor(m),)))  # as large as a header: no announcement of a size
                sent += 1
        assert len(sender.under_way) == sender.under_way.peak
        dist.barrier()
        sender.timeout = 20
        for m in range(sent, 20):  # the other side takes them now
            sender.send(Message(m, (torch.tensor(m),)))
        sender.wait_until_taken(20)
        assert sender.under_way.peak <= queue + 1
        return sent
    dist.barrier()
    receiver = RemoteReceiver(0, group, cpu, Codecs(), 20)
    receiver.expect(range(20))
    for m in range(20):
        assert receiver.recv(m, "the test") is not None
    return 0


@pytest.mark.parametrize("queue", [1, 4])
def test_a_full_queue_waits(queue: int) -> None:
    sent = worlds.run(2, send_until_full, queue)[0]
    # The first message tells its size before it, and that is a buffer too.
    assert max(1, queue - 1) <= sent <= queue


def run_ahead(case: dict[str, Any], calls: int) -> list[float]:
    """When each call of train_batch was over; the last rank is slow."""
    engine = engine_cases.build(case)
    made = batches(calls) if engine.is_first_stage() else None
    over = []
    for m in range(calls):
        if engine.is_last_stage():
            time.sleep(0.15)
        engine.train_batch(iter([made[m]]) if made is not None else None)
        over.append(time.monotonic())
    engine.drain()
    return over


@pytest.mark.parametrize(("queue", "hops"), [(1, [0, 1]), (3, [0, 1]), (3, [1, 1])])
def test_the_first_rank_runs_ahead_by_the_queue(queue: int, hops: list[int]) -> None:
    """No further than its queue, its hops and the one message whose receive the next rank posts ahead; and as far as its queue,
    where the next is slow."""
    calls = 16
    case = {"method": "dgl", "stages": 2, "batches": calls, "block": {"queue": queue, "hops": hops, "head": "linear"}}
    first, last = worlds.run(2, run_ahead, case, calls)
    ahead = [sum(over <= end for over in first) - done for done, end in enumerate(last, 1)]  # micro-batches, at each end
    assert queue <= max(ahead) <= queue + hops[0] + 1, ahead
    assert ahead[calls // 2] < calls - calls // 2 - 1, "the first rank is done long before: the test shows nothing"


def test_a_larger_queue_lets_it_go() -> None:
    """All of the first rank's work is done while the last one sleeps."""
    calls = 12
    case = {"method": "dgl", "stages": 2, "batches": calls, "block": {"queue": 2 * calls, "head": "linear"}}
    first, last = worlds.run(2, run_ahead, case, calls)
    assert first[-1] < last[calls // 2]
