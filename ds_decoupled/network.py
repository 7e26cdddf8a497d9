"""One rank's links: a queue into every stage it holds, and channels to its neighbours."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_decoupled.errors import LinkError, PeerError, one_line
from ds_decoupled.leaving import wait_at_exit
from ds_decoupled.links import Codecs, LocalLink, Message, Packed, RemoteReceiver, RemoteSender, ReplayRing, buffer_device
from ds_decoupled.links.coding import DIRECTIONS, Coding
from ds_decoupled.schedules import Action, Placement, Slot
from ds_decoupled.schedules.replay import Replay

#: One process group a channel, so that no message waits behind one that goes the other way; evaluation has its own, so
#: that it may come at any time, and so have passes beside training from which something comes down again.
_CHANNELS = ("forward", "backward", "evaluation", "beside forward", "beside backward")

#: Of these, what training goes by.
TRAINING = _CHANNELS[:2]

#: Messages on their way into a stage, in a checkpoint, and the direction that they come from.
_KINDS = {"activations": "forward", "gradients": "backward"}

#: Batches that a rank may be ahead of the next one in a pass outside of training.
_AHEAD = 8

#: Seconds in which a neighbour that waits has heard of a failure; one that computes hears of it while this process leaves.
_HEARD = 1.0


def _make_groups(grid: Any, beside: bool, backend: str | None) -> dict[str, Any]:
    """This rank's process group of every channel; every rank makes all groups, in the same order."""
    own = {}
    for ranks in grid.pipe_groups:
        for direction in _CHANNELS if beside else _CHANNELS[:3]:
            group = dist.new_group(ranks, backend=backend)
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


@dataclass(frozen=True)
class Channel:
    """One direction of messages along the pipe: from the neighbour before, to the neighbour after (either may be missing)."""

    receiver: RemoteReceiver | None = None
    sender: RemoteSender | None = None


class Network:
    """The links of one rank.

    Args:
        grid: DeepSpeed's grid.
        placement: stages and their ranks.
        rank: this process's place on the pipe axis.
        device: where tensors live.
        codecs: how a channel's values are written: new ones at each call, for one side of one link.
        timeout: seconds that a receive may take.
        beside: whether there are passes beside training from which something comes down: exact gradients, heads' lessons.
        queue: messages of training that may be on their way to a neighbour before this rank waits until it takes one.
        seed: of what codecs draw by chance.
        replay: how stages replay their input; None where it streams.
        memory: where replay rings keep messages; by default on ``device``.
        every_link: whether codecs act on links within the rank too.

    Attributes:
        channels: by name, see ``_CHANNELS``.
        coding: the codecs of all links.
        failed: whether this rank or another has failed.
        rings: the replay rings before stages here, by stage.
        replicas: the group of data-parallel replicas; None for one.
    """

    #: Of the channels' process groups; None for the default's.
    backend: str | None = None

    def __init__(self, grid: Any, placement: Placement, rank: int, device: torch.device,
                 codecs: Callable[[str], Codecs], timeout: float, queue: int, beside: bool = False,
                 seed: Callable[[], int] = int, replay: Replay | None = None, memory: torch.device | None = None,
                 every_link: bool = False) -> None:
        self.placement, self.rank, self.timeout, self.device = placement, rank, timeout, device
        self.replicas = grid.get_data_parallel_group() if grid.get_data_parallel_world_size() > 1 else None
        stages = placement.stages_of(rank)
        self.bottom, self.top = stages[0], stages[-1]
        self.coding = Coding(codecs, seed, grid.get_data_parallel_rank(), self.bottom, self.top, every_link)
        # Link s joins stages s and s+1. At the ends of the rank a queue holds what waits to be sent, or has come and waits.
        self._links: dict[tuple[str, int], LocalLink] = {
            (way, link): LocalLink(self.coding.writers.get((way, link)))
            for way in DIRECTIONS for link in range(self.bottom - 1, self.top + 1)}
        self.rings = {} if replay is None else {
            stage: self._make_ring(stage, replay, memory or device) for stage in stages if stage > 0}
        self._links.update({("forward", stage - 1): ring for stage, ring in self.rings.items()})
        self._batches = LocalLink()
        below = grid.stage_to_global(rank - 1) if rank > 0 else None
        above = grid.stage_to_global(rank + 1) if rank < placement.ranks - 1 else None
        self.channels: dict[str, Channel] = {}
        if placement.ranks > 1:
            for name, group in _make_groups(grid, beside, self.backend).items():
                ends = (above, below) if "backward" in name else (below, above)
                self.channels[name] = self._make_channel(name, group, *ends, queue)
                _open(group, *ends, sends_first=rank % 2 == 0, device=buffer_device(group, device))
        else:
            self.channels = {name: Channel() for name in _CHANNELS}
        self._forward, self._backward = self.channels["forward"], self.channels["backward"]
        self.failed = False
        self.start_run(0)
        wait_at_exit(self)

    def _make_ring(self, stage: int, replay: Replay, memory: torch.device) -> ReplayRing:
        return ReplayRing(replay, memory, self.device, self.coding.writers.get(("forward", stage - 1)))

    def _make_channel(self, name: str, group: Any, before: int | None, after: int | None, queue: int) -> Channel:
        room, codecs, writer = queue if name in TRAINING else _AHEAD, self.coding.receiver(name), self.coding.sender(name)
        return Channel(
            None if before is None else RemoteReceiver(before, group, self.device, codecs, self.timeout,
                                                       self._keeps_codes(name, codecs)),
            None if after is None else RemoteSender(after, group, self.device, writer.codecs, self.timeout, room, writer.seed))

    def _keeps_codes(self, channel: str, codecs: Codecs) -> bool:
        """Whether messages that come stay in their wire form: in a ring they wait, and are used several times."""
        return channel == "forward" and self.bottom in self.rings and not codecs.trivial

    def queues(self, stage: int) -> dict[Slot, LocalLink]:
        """The queues of a stage here. No message leaves the model at its ends."""
        found = {slot: self._links[slot.travels, slot.link(stage)] for slot in Slot
                 if slot.travels and (slot is Slot.INPUT or 0 <= slot.link(stage) < self.placement.stages - 1)}
        return {**found, Slot.BATCH: self._batches} if stage == 0 else found

    def feed(self, micro_batch: int, parts: tuple[Any, ...]) -> None:
        """A raw micro-batch, for the stage that loads it."""
        self._batches.send(Message(micro_batch, parts))

    # -- what will come -------------------------------------------------------------------------------------------------

    def start_run(self, first: int, sent_up: int = 0) -> None:
        """Micro-batches from ``first`` on follow, of which ``sent_up`` have been sent to the next rank already."""
        self._sent_up = first + sent_up  # the first that has not been sent up
        # A gradient comes back only for what was sent up, and the data may end before all of it was.
        self._gradients_to_come: deque[int] = deque()
        self._end: int | None = None
        for receiver in (self._forward.receiver, self._backward.receiver):
            if receiver is not None:
                receiver.start()

    def expect(self, activations: Iterable[int], gradients: Iterable[int]) -> None:
        """The neighbours will send these micro-batches' activations and gradients, in this order, while this rank goes on to
        where it will be; unless the data end before them."""
        if self._forward.receiver is not None:
            self._forward.receiver.expect(activations)
        if self._backward.receiver is not None:
            self._gradients_to_come.extend(gradients)
            self._expect_gradients()

    def _expect_gradients(self) -> None:
        """A gradient is sure to come once its activation was sent, and its time has come."""
        assert self._backward.receiver is not None
        while self._gradients_to_come:
            micro_batch = self._gradients_to_come[0]
            if self._end is None or micro_batch < self._end:  # else it was never fed
                if micro_batch >= self._sent_up:
                    return
                self._backward.receiver.expect([micro_batch])
            self._gradients_to_come.popleft()

    # -- training ---------------------------------------------------------------------------------------------------------

    def send(self, action: Action) -> None:
        """Send what lies in the slot that the action takes."""
        stage, slot, m = action.stage, action.kind.takes, action.micro_batch
        assert slot is not None and slot.travels is not None
        sender = self.channels[slot.travels].sender
        assert sender is not None
        queue = self._links[slot.travels, slot.link(stage)]
        sender.send(queue.recv(m, f"stage {stage}, {action.kind.words}: {slot.value}"))
        if slot.travels == "forward":
            self._sent_up = m + 1
            if self._backward.receiver is not None:
                self._expect_gradients()

    def receive(self, action: Action) -> tuple[int, PeerError | None] | None:
        """Take in what the action gives. Returns the micro-batch at which the data ended, once that is known, and why if not
        for the data's end."""
        stage, slot, m = action.stage, action.kind.gives[0], action.micro_batch
        assert slot.travels is not None
        receiver = self.channels[slot.travels].receiver
        assert receiver is not None
        source = stage - 1 if slot.travels == "forward" else stage + 1
        message = receiver.recv(m, self.waiting(stage, source, f"the {action.kind.carries}", m))
        if message is not None:
            self._links[slot.travels, slot.link(stage)].send(message)
        return None if receiver.end is None else (receiver.end, data_failed(receiver))

    def leave(self, timeout: float | None = None) -> None:
        """This process ends, and takes what it sent with it: wait until all of it has been taken, as in
        :meth:`wait_until_taken`."""
        self.wait_until_taken(timeout=timeout)

    def wait_until_taken(self, *channels: str, timeout: float | None = None) -> None:
        """Wait until all that was sent (on these channels; by default on all) has been taken.

        Raises:
            LinkError: if that takes longer than ``timeout`` seconds (by default the setting's), or a neighbour is gone.
        """
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        for name, channel in self.channels.items():
            if channel.sender is not None and name in (channels or self.channels):
                channel.sender.wait_until_taken(max(0.0, end - time.monotonic()))

    def tell_failure(self, rank: int, reason: str) -> None:
        """Pipe rank ``rank`` failed: its neighbours learn why, whatever they wait for. Only the first call does anything."""
        if self.failed:
            return
        self.failed = True
        for channel in self.channels.values():
            if channel.sender is not None:
                with contextlib.suppress(LinkError):
                    channel.sender.send_failure(rank, reason)
        with contextlib.suppress(LinkError):
            self.wait_until_taken(timeout=_HEARD)

    def pass_on_end(self, micro_batch: int, reason: str | None = None) -> None:
        """Tell the next rank that the data end before ``micro_batch``, and why if not for the data's end."""
        self._end = micro_batch
        if self._forward.sender is not None:
            self._forward.sender.send_end(micro_batch, reason)

    def waiting(self, stage: int, source: int, what: str, micro_batch: int) -> str:
        """For errors: who waits for what, from whom."""
        ranks = self.placement.rank_of_stage
        return (f"stage {stage} (pipe rank {self.rank}) was waiting for {what} of micro-batch {micro_batch} "
                f"from stage {source} (pipe rank {ranks[source]})")

    def agree(self, number: int, error: Exception | None) -> Exception | None:
        """Before a call begins: rank 0 says whether its data go on, and every rank knows. A call of all ranks.

        Args:
            number: of the next micro-batch.
            error: why it will not come, on rank 0; None elsewhere.

        Returns:
            Rank 0's error; on other ranks StopIteration for a StopIteration, else a :class:`PeerError` that says the same.
        """
        channel = self.channels["evaluation"]
        if channel.receiver is not None:
            channel.receiver.start()
            channel.receiver.expect([number])
            told = channel.receiver.recv(number, self.waiting(self.bottom, 0, "word", number))
            error = None if told is not None else data_failed(channel.receiver) or StopIteration()
        if channel.sender is not None:
            if error is None:
                channel.sender.send(Message(number, (torch.zeros(1),)))
            else:
                reason = error.reason if isinstance(error, PeerError) else one_line(error)
                channel.sender.send_end(number, None if isinstance(error, StopIteration) else reason)
        return error

    # -- counters and checkpoints -----------------------------------------------------------------------------------

    def report(self, k: int) -> dict[str, Any]:
        """What training has sent to other ranks (bytes, messages), :meth:`held`, and the replay rings by stage; ``k``:
        messages of an update."""
        senders = [channel.sender for channel in (self._forward, self._backward) if channel.sender is not None]
        return {"bytes": sum(sender.bytes_sent for sender in senders),
                "messages": sum(sender.messages_sent for sender in senders), "held": self.held(),
                "rings": {stage: ring.report(k) for stage, ring in self.rings.items()}}

    def queued(self) -> Iterator[Message | Packed]:
        """Messages that wait between stages here, or to be sent."""
        for link in self._links.values():
            yield from link.queue

    def held(self) -> dict[str, int]:
        """What this rank's links hold: ``sent`` buffers that the other side has not taken, messages that ``arrived`` from
        other ranks and messages ``queued`` between stages, neither asked for yet; and ``peak_sent`` of any link so far."""
        senders = [channel.sender for channel in self.channels.values() if channel.sender is not None]
        receivers = [channel.receiver for channel in self.channels.values() if channel.receiver is not None]
        return {"sent": sum(len(sender.under_way) for sender in senders),
                "sent_bytes": sum(sender.under_way.nbytes for sender in senders),
                "arrived": sum(receiver.held for receiver in receivers),
                "queued": sum(1 for _ in self.queued()),
                "peak_sent": max((sender.under_way.peak for sender in senders), default=0)}

    def pending(self) -> dict[str, dict[int, list[Message]]]:
        """Messages on their way into this rank's stages: ``activations`` and ``gradients``, by stage."""
        for receiver, what in ((self._forward.receiver, "activations"), (self._backward.receiver, "gradients")):
            if receiver is not None:
                receiver.collect(f"pipe rank {self.rank}, saving a checkpoint: {what} on their way")
        found: dict[str, dict[int, list[Message | Packed]]] = {
            kind: {s: list(self._into(direction, s).queue) for s in range(self.bottom, self.top + 1)}
            for kind, direction in _KINDS.items()}
        if self._forward.receiver is not None:
            found["activations"][self.bottom] += self._forward.receiver.arrived
        if self._backward.receiver is not None:
            found["gradients"][self.top] += self._backward.receiver.arrived
        return {kind: {s: [message.opened() for message in messages] for s, messages in by_stage.items()}
                for kind, by_stage in found.items()}

    def _into(self, direction: str, stage: int) -> LocalLink:
        return self._links[direction, stage - 1 if direction == "forward" else stage]

    def restore(self, pending: Mapping[str, Mapping[int, Sequence[Message]]], first: int, sent_up: int) -> None:
        """The inverse of :meth:`pending`, on this or another placement.

        Args:
            pending: for this rank's stages.
            first: the run's first micro-batch.
            sent_up: micro-batches of the run that this rank has sent to the next one.
        """
        self.start_run(first, sent_up)
        self._batches.queue.clear()
        for link in self._links.values():
            link.queue.clear()
        for kind, direction in _KINDS.items():
            receiver = self.channels[direction].receiver
            if receiver is not None:
                receiver.arrived.clear()
            from_outside = self.bottom if direction == "forward" else self.top
            for stage, messages in pending[kind].items():
                into = self._into(direction, stage).queue
                (receiver.arrived if receiver is not None and stage == from_outside else into).extend(messages)


def data_failed(receiver: RemoteReceiver) -> PeerError | None:
    """Why the data ended, if not for their own end."""
    if receiver.end_reason is None:
        return None
    return PeerError(f"the data of pipe rank 0 failed before micro-batch {receiver.end}: {receiver.end_reason}", 0,
                     receiver.end_reason)
