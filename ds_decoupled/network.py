"""One rank's links: a queue into every stage it holds, and a pair of remote links to each neighbour."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from ds_decoupled.errors import LinkError, PeerError, one_line
from ds_decoupled.leaving import wait_at_exit
from ds_decoupled.links import Codec, LocalLink, Message, RemoteReceiver, RemoteSender, buffer_device
from ds_decoupled.schedules import Plan

#: One process group a direction, so that no message waits behind one that goes the other way; evaluation has its own, so
#: that it may come at any time.
_DIRECTIONS = ("forward", "backward", "evaluation", "exact forward", "exact backward")

#: Seconds in which a neighbour that waits has heard of a failure; one that computes hears of it while this process leaves.
_HEARD = 1.0


def _make_groups(grid: Any, track: bool) -> dict[str, Any]:
    """This rank's process group of every direction; every rank makes all groups, in the same order."""
    own = {}
    for ranks in grid.pipe_groups:
        for direction in _DIRECTIONS if track else _DIRECTIONS[:3]:
            group = dist.new_group(ranks)
            if grid.global_rank in ranks:
                own[direction] = group
    return own


def _open(group: Any, before: int | None, after: int | None, sends_first: bool, device: torch.device) -> None:
    """Send one number along the chain. NCCL makes a pair's communicator at its first message and blocks both hosts until
    both are there; a receive posted ahead would wait for a sender that waits for something else."""
    number = torch.zeros(1, device=device)
    if sends_first and after is not None:
        dist.send(number, after, group=group)
    if before is not None:
        dist.recv(number, before, group=group)
    if not sends_first and after is not None:
        dist.send(number, after, group=group)


class Pair:
    """A one-way chain of links along the pipe: from the neighbour before, to the neighbour after (either may be missing)."""

    def __init__(self, group: Any, before: int | None, after: int | None, device: torch.device, codec: Codec,
                 timeout: float, queue: int | None = None) -> None:
        self.receiver = None if before is None else RemoteReceiver(before, group, device, codec, timeout)
        self.sender = None if after is None else RemoteSender(after, group, device, codec, timeout, queue)


class Network:
    """The links of one rank.

    Args:
        grid: DeepSpeed's grid.
        plan: the plan.
        rank: this process's place on the pipe axis.
        device: where tensors live.
        codec: how values are written between ranks.
        timeout: seconds that a receive may take.
        queue: activations that may be on their way to the next rank before this one waits; None where gradients that come
            back keep ranks together.

    Attributes:
        activations: queue of messages ``(inputs, labels)`` into each local stage, and of what waits to be sent to the next.
        gradients: queue of messages ``(gradients, reconstruction, loss)`` into each local stage, and of what waits to be sent
            to the previous.
        failed: whether this rank or another has failed.
    """

    def __init__(self, grid: Any, plan: Plan, rank: int, device: torch.device, codec: Codec, timeout: float,
                 track: bool = False, queue: int | None = None) -> None:
        self.plan, self.rank, self.timeout = plan, rank, timeout
        stages = plan.placement.stages_of(rank)
        self.bottom, self.top = stages[0], stages[-1]
        self.activations = {s: LocalLink() for s in range(self.bottom, self.top + 2)}
        self.gradients = {s: LocalLink() for s in range(self.bottom - 1, self.top + 1)}
        below = grid.stage_to_global(rank - 1) if rank > 0 else None
        above = grid.stage_to_global(rank + 1) if rank < plan.placement.ranks - 1 else None
        self._up: dict[str, Pair] = {}
        if plan.placement.ranks > 1:
            for name, group in _make_groups(grid, track).items():
                ends = (above, below) if "backward" in name else (below, above)
                self._up[name] = Pair(group, *ends, device, codec, timeout, queue if name == "forward" else None)
                _open(group, *ends, sends_first=rank % 2 == 0, device=buffer_device(group, device))
        else:
            self._up = {name: Pair(None, None, None, device, codec, timeout) for name in _DIRECTIONS}
        self._forward, self._backward = self._up["forward"], self._up["backward"]
        self.failed = False
        self.start_run()
        wait_at_exit(self)

    def chain(self, name: str) -> Pair:
        """The links of one direction."""
        return self._up[name]

    # -- what will come -------------------------------------------------------------------------------------------------

    def start_run(self) -> None:
        """Micro-batches of a new run follow; nothing is in flight."""
        self._activations_expected = 0  # of this run
        self._gradients_tick = 0  # gradients that the stage above sends before this tick have been counted
        self._gradients_to_come: deque[int] = deque()
        self._sent_up = 0
        self._end: int | None = None
        for receiver in (self._forward.receiver, self._backward.receiver):
            if receiver is not None:
                receiver.start()

    def expect(self, end_tick: int, fed: int, first: int) -> None:
        """The neighbours will have worked through their ticks before ``end_tick`` when they are where this rank will be."""
        self._first = first
        ticks = self.plan.ticks
        if self._forward.receiver is not None:
            until = min(fed, end_tick - ticks.forward(self.bottom - 1, 0))
            self._forward.receiver.expect(first + m for m in range(self._activations_expected, until))
            self._activations_expected = max(self._activations_expected, until)
        if self._backward.receiver is not None:
            for tick in range(self._gradients_tick, end_tick):
                self._gradients_to_come.extend(m for m in ticks.gradients_sent(self.top + 1, tick) if 0 <= m < fed)
            self._gradients_tick = max(self._gradients_tick, end_tick)
            self._expect_gradients()

    def _expect_gradients(self) -> None:
        """A gradient is sure to come once its activation was sent, and its time has come."""
        assert self._backward.receiver is not None
        while self._gradients_to_come:
            micro_batch = self._gradients_to_come[0]
            if self._end is None or self._first + micro_batch < self._end:  # else it was never fed
                if micro_batch >= self._sent_up:
                    return
                self._backward.receiver.expect([self._first + micro_batch])
            self._gradients_to_come.popleft()

    # -- training ---------------------------------------------------------------------------------------------------------

    def send_activation(self, stage: int, micro_batch: int) -> None:
        assert self._forward.sender is not None
        self._forward.sender.send(self.activations[stage + 1].recv(micro_batch, f"stage {stage}, sending its output"))
        self._sent_up = micro_batch - self._first + 1
        if self._backward.receiver is not None:
            self._expect_gradients()

    def recv_activation(self, stage: int, micro_batch: int) -> tuple[int, PeerError | None] | None:
        """Take the stage's input in. Returns the micro-batch at which the data ended, once that is known, and why if not for
        the data's end."""
        receiver = self._forward.receiver
        assert receiver is not None
        message = receiver.recv(micro_batch, self._waiting(stage, stage - 1, "the activation", micro_batch))
        if message is not None:
            self.activations[stage].send(message)
        return None if receiver.end is None else (receiver.end, self._data_failed(receiver))

    def send_gradient(self, stage: int, micro_batch: int) -> None:
        assert self._backward.sender is not None
        self._backward.sender.send(self.gradients[stage - 1].recv(micro_batch, f"stage {stage}, sending its gradient"))

    def recv_gradient(self, stage: int, micro_batch: int) -> None:
        receiver = self._backward.receiver
        assert receiver is not None
        message = receiver.recv(micro_batch, self._waiting(stage, stage + 1, "the gradient", micro_batch))
        assert message is not None
        self.gradients[stage].send(message)

    def flush(self, *directions: str, timeout: float | None = None) -> None:
        """Wait until all that was sent (in these directions) has been taken.

        Raises:
            LinkError: if that takes longer than ``timeout`` seconds (by default the setting's), or a neighbour is gone.
        """
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        for name, pair in self._up.items():
            if pair.sender is not None and name in (directions or self._up):
                pair.sender.flush(max(0.0, end - time.monotonic()))

    def tell_failure(self, rank: int, reason: str) -> None:
        """Pipe rank ``rank`` failed: its neighbours learn why, whatever they wait for. Only the first call does anything."""
        if self.failed:
            return
        self.failed = True
        for pair in self._up.values():
            if pair.sender is not None:
                with contextlib.suppress(LinkError):
                    pair.sender.send_failure(rank, reason)
        with contextlib.suppress(LinkError):
            self.flush(timeout=_HEARD)

    def pass_on_end(self, micro_batch: int, reason: str | None = None) -> None:
        """Tell the next rank that the data end before ``micro_batch``, and why if not for the data's end."""
        self._end = micro_batch
        if self._forward.sender is not None:
            self._forward.sender.send_end(micro_batch, reason)

    @staticmethod
    def _data_failed(receiver: RemoteReceiver) -> PeerError | None:
        if receiver.end_reason is None:
            return None
        return PeerError(f"the data of pipe rank 0 failed before micro-batch {receiver.end}: {receiver.end_reason}", 0,
                         receiver.end_reason)

    def _waiting(self, stage: int, source: int, what: str, micro_batch: int) -> str:
        ranks = self.plan.placement.rank_of_stage
        return (f"stage {stage} (pipe rank {self.rank}) was waiting for {what} of micro-batch {micro_batch} "
                f"from stage {source} (pipe rank {ranks[source]})")

    # -- evaluation ---------------------------------------------------------------------------------------------------------

    def expect_evaluation(self, count: int) -> None:
        """``count`` micro-batches follow for evaluation."""
        receiver = self._up["evaluation"].receiver
        if receiver is not None:
            receiver.start()
            receiver.expect(range(count))

    def recv_evaluation(self, micro_batch: int) -> tuple[tuple[Any, ...] | None, Exception | None]:
        """The parts of the message, or why it will not come: the first rank's data ended or failed."""
        receiver = self._up["evaluation"].receiver
        assert receiver is not None
        message = receiver.recv(micro_batch, self._waiting(self.bottom, self.bottom - 1, "the evaluation", micro_batch))
        if message is not None:
            return message.parts, None
        return None, self._data_failed(receiver) or StopIteration(
            f"the evaluation data ended before micro-batch {micro_batch}")

    def send_evaluation(self, message: Message) -> None:
        sender = self._up["evaluation"].sender
        assert sender is not None
        sender.send(message)

    def end_evaluation(self, micro_batch: int, error: Exception) -> None:
        """Tell the next rank why ``micro_batch`` and those after it will not come."""
        sender = self._up["evaluation"].sender
        if sender is not None:
            reason = error.reason if isinstance(error, PeerError) else one_line(error)
            sender.send_end(micro_batch, None if isinstance(error, StopIteration) else reason)

    # -- counters and checkpoints -----------------------------------------------------------------------------------

    def bytes_sent(self) -> int:
        """Bytes that training sent to other ranks."""
        return sum(pair.sender.bytes_sent for pair in (self._forward, self._backward) if pair.sender is not None)

    def messages_sent(self) -> int:
        """Messages that training sent to other ranks."""
        return sum(pair.sender.messages_sent for pair in (self._forward, self._backward) if pair.sender is not None)

    def held(self) -> dict[str, int]:
        """What this rank's links hold: ``sent`` buffers that the other side has not taken, messages that ``arrived`` from
        other ranks and messages ``queued`` between stages, neither asked for yet; and ``peak_sent`` of any link so far."""
        senders = [pair.sender for pair in self._up.values() if pair.sender is not None]
        receivers = [pair.receiver for pair in self._up.values() if pair.receiver is not None]
        queues = [*self.activations.values(), *self.gradients.values()]
        return {"sent": sum(len(sender.under_way) for sender in senders),
                "sent_bytes": sum(sender.under_way.nbytes for sender in senders),
                "arrived": sum(receiver.held for receiver in receivers),
                "queued": sum(len(link.queue) for link in queues),
                "peak_sent": max((sender.under_way.peak for sender in senders), default=0)}

    def pending(self) -> dict[str, dict[int, list[Message]]]:
        """Messages on their way into this rank's stages."""
        for receiver, what in ((self._forward.receiver, "activations"), (self._backward.receiver, "gradients")):
            if receiver is not None:
                receiver.collect(f"pipe rank {self.rank}, saving a checkpoint: {what} on their way")
        activations = {s: list(self.activations[s].queue) for s in range(self.bottom, self.top + 1)}
        gradients = {s: list(self.gradients[s].queue) for s in range(self.bottom, self.top + 1)}
        if self._forward.receiver is not None:
            activations[self.bottom] += self._forward.receiver.arrived
        if self._backward.receiver is not None:
            gradients[self.top] += self._backward.receiver.arrived
        return {"activations": activations, "gradients": gradients}

    def restore(self, pending: dict[str, dict[int, list[Message]]], end_tick: int, fed: int, first: int) -> None:
        """The inverse of :meth:`pending`, on this or another placement.

        Args:
            pending: by kind and stage, for this rank's stages.
            end_tick: ticks that all ranks have worked through.
            fed: micro-batches of the run.
            first: its first micro-batch.
        """
        self.start_run()
        self._first = first
        ticks = self.plan.ticks
        for links, kind in ((self.activations, "activations"), (self.gradients, "gradients")):
            for s, link in links.items():
                link.queue.clear()
                if self.bottom <= s <= self.top:
                    link.queue.extend(pending[kind][s])
        for pair, kind, stage in ((self._forward, "activations", self.bottom), (self._backward, "gradients", self.top)):
            queue = (self.activations if kind == "activations" else self.gradients)[stage].queue
            if pair.receiver is not None:
                pair.receiver.arrived.clear()
                pair.receiver.arrived.extend(queue)
                queue.clear()
        if self._forward.receiver is not None:
            self._activations_expected = max(0, min(fed, end_tick - ticks.forward(self.bottom - 1, 0)))
        if self._backward.receiver is not None:
            self._gradients_tick = end_tick
            self._sent_up = max(0, min(fed, end_tick - ticks.forward(self.top, 0)))
