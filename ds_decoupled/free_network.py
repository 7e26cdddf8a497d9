"""One rank's links where ranks run free: nobody waits for anybody, unless there is nothing at all to work on.

::

    rank r-1 --[messages, ends, marks]--> thread --> ring of the bottom stage --> this rank's turns --> rank r+1
    rank r-1 <--[failures, "left"]------------------------------------------- rank r

A message for which there is no room is dropped and counted: by the ring, which loses its oldest, or by the sender, where the
receiver's whole process stands still.

With a cap on the uses of a message a rank may run out of them while the rank below waits for it, in a call of all ranks. So **a
rank's n-th call needs nothing beyond the n-th call of the rank below**: once that is over, a call that finds nothing more is
over too. Who runs out asks::

    rank r-1  <--["call n?"]--  rank r
              --["n are over"]-->          behind all that was sent in them
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ds_decoupled.collectives import error_of_group
from ds_decoupled.errors import LinkError, PeerError
from ds_decoupled.links import Message, Packed, ReplayRing
from ds_decoupled.links.free import FreeReceiver, FreeSender, SharedRing
from ds_decoupled.links.peers import Peers, completion
from ds_decoupled.network import TRAINING, Channel, Network
from ds_decoupled.schedules import Action
from ds_decoupled.schedules.replay import Replay


@dataclass(frozen=True)
class NoInput:
    """There is nothing to use.

    Attributes:
        reason: why.
        for_good: whether nothing will come, or only nothing in this call.
    """

    reason: str
    for_good: bool = True


class FreeNetwork(Network):
    """Links of ranks that run free.

    Attributes:
        changed: is told of whatever comes.
        idle: micro-batches for which there was nothing to use.
    """

    # Threads of the host wait for messages, and a receive of NCCL would hold processors of the device as long.
    backend = "gloo"

    def __init__(self, grid: Any, *args: Any, **kwargs: Any) -> None:
        self.changed = threading.Condition()
        self.idle = 0
        self._calls, self._below_calls = 0, 0  # that are over, here and below; they never count back
        self._ahead = 0  # calls that the rank below had ended more than this one, when both were last in a call of all ranks
        self._asked: int | None = None  # the call that the rank above would like to hear of
        super().__init__(grid, *args, **kwargs)
        self._below = receiver if isinstance(receiver := self._forward.receiver, FreeReceiver) else None
        self._above = receiver if isinstance(receiver := self._backward.receiver, FreeReceiver) else None
        self._control = None
        for ranks in grid.pipe_groups if self.placement.ranks > 1 else ():
            group = dist.new_group(ranks, backend=self.backend)
            if grid.global_rank in ranks:
                self._control = group
        self._peers = Peers(self.changed, [
            (receiver, back) for receiver, back in ((self._below, self._backward.sender), (self._above, self._forward.sender))
            if receiver is not None and isinstance(back, FreeSender)])
        self._peers.begin()

    def _make_ring(self, stage: int, replay: Replay, memory: torch.device) -> ReplayRing:
        if stage > self.bottom:
            return super()._make_ring(stage, replay, memory)
        return SharedRing(replay, memory, self.device, self.changed)  # from another rank: written already

    def _make_channel(self, name: str, group: Any, before: int | None, after: int | None, queue: int) -> Channel:
        if name not in TRAINING:
            return super()._make_channel(name, group, before, after, queue)
        # Nothing goes down but what is said of a rank.
        deliver = self.rings[self.bottom].send if name == "forward" and self.bottom in self.rings else _nothing
        codecs, writer = self.coding.receiver(name), self.coding.sender(name)
        heard = self._below_told if name == "forward" else self._above_asks
        return Channel(
            None if before is None else FreeReceiver(before, group, self.device, codecs, deliver, self.changed,
                                                     self._keeps_codes(name, codecs), heard),
            None if after is None else FreeSender(after, group, self.device, writer.codecs, self.timeout, queue, writer.seed))

    # -- what a runner asks ------------------------------------------------------------------------------------------------

    def wait_for_input(self) -> NoInput | None:
        """Wait until the bottom stage has something to use. Returns why there is nothing, where that is so.

        Raises:
            LinkError: if nothing comes within the setting's time, or a neighbour is gone; :class:`PeerError` if one failed.
        """
        ring, below = self.rings.get(self.bottom), self._below
        if ring is None or below is None:
            return None
        call = self._calls + 1 + self._ahead

        def over() -> NoInput | None:
            if ring.order.can_draw:
                return None
            if below.left:
                return NoInput("the rank below has left")
            if below.data_end is not None:
                return NoInput("the data ended")
            return NoInput("the rank below has made this call", for_good=False) if self._below_calls >= call else None

        def settled() -> bool:
            return ring.order.can_draw or over() is not None or self._failure() is not None

        with self.changed:
            if settled():
                self.check()
                return over()
        question = self._backward.sender
        if isinstance(question, FreeSender):
            self._peers.saying(below, lambda: question.send_call(call))
        with self.changed:
            came = self.changed.wait_for(settled, self.timeout)
            self.check()
            if not came:
                waiting = self.waiting(self.bottom, self.bottom - 1, "an activation", ring.order.newest + 1)
                raise LinkError(f"{waiting}: nothing came within {self.timeout:g} s")
            return over()

    def call_over(self) -> None:
        """This rank has made a call; the rank above may be waiting to hear so."""
        with self.changed:
            self._calls += 1
            asked = self._asked is not None and self._calls >= self._asked
        if asked:
            self._answer()

    def _above_asks(self, call: int) -> None:
        with self.changed:
            over = self._calls >= call
            self._asked = None if over else call
        if over:
            with suppress(LinkError):  # a rank above that is gone is noticed by whoever listens to it: this thread
                self._answer()

    def _answer(self) -> None:
        sender = self._forward.sender
        if isinstance(sender, FreeSender):
            with self.changed:
                self._asked, calls = None, self._calls
            self._saying(lambda: sender.send_call(calls))

    def _below_told(self, calls: int) -> None:
        with self.changed:
            self._below_calls = max(self._below_calls, calls)
            self.changed.notify_all()

    def agree_replicas(self, error: Exception | None) -> Exception | None:
        """``error``, or why another replica has nothing more to do. A collective call of replicas, which step together."""
        return error_of_group(error, self.replicas, self.device)

    @property
    def data_ended(self) -> tuple[int, PeerError | None] | None:
        """Whether the data ended and everything that came before has been used: at which message, and why if they failed."""
        below = self._below
        if below is None:
            return None
        with self.changed:
            if below.data_end is None or self.rings[self.bottom].order.unseen:
                return None
            reason = below.data_failed
            return below.data_end, None if reason is None else PeerError(f"the data of pipe rank 0 failed: {reason}", 0, reason)

    def check(self) -> None:
        """Raises what a neighbour failed with, if one did."""
        self._peers.check()

    def _failure(self) -> LinkError | None:
        return self._peers.failure

    def arrive(self) -> Callable[[], bool]:
        """This rank is done. Gives a question: whether all ranks of the pipe are. A call of all of them."""
        if self._control is None:
            return lambda: True
        return completion(dist.barrier(group=self._control, async_op=True), self.check,
                          f"pipe rank {self.rank} was waiting for all ranks, and one is gone")

    def pass_mark(self, before: Callable[[], None] = lambda: None) -> None:
        """Wait until all that the rank below sent is here, do ``before``, and let the rank above know likewise. A call of all
        ranks of the pipe."""
        below, sender = self._below, self._forward.sender
        if below is not None:
            with self.changed:
                self.changed.wait_for(lambda: below.marks or below.left or self._failure() is not None, self.timeout)
                self.check()
                if not below.marks and not below.left:
                    raise LinkError(f"pipe rank {self.rank} was waiting for pipe rank {self.rank - 1} to finish, which took "
                                    f"more than {self.timeout:g} s")
                below.marks -= bool(below.marks)
                self._ahead = self._below_calls - self._calls
        before()
        if isinstance(sender, FreeSender):
            self._answer()
            self._saying(sender.send_mark)

    # -- as other networks -------------------------------------------------------------------------------------------------

    def expect(self, activations: Iterable[int], gradients: Iterable[int]) -> None:
        """Whatever comes is taken in."""

    def start_run(self, first: int, sent_up: int = 0) -> None:
        super().start_run(first, sent_up)
        for channel in (self._forward, self._backward):
            if isinstance(channel.receiver, FreeReceiver):
                channel.receiver.restart()

    def send(self, action: Action) -> None:
        """Send what the topmost stage gave, if there is room."""
        message = self._links["forward", action.stage].recv(action.micro_batch, f"stage {action.stage}, {action.kind.words}")
        self.offer(message)

    def offer(self, message: Message) -> None:
        """Send ``message`` to the next rank, if there is room and that rank is still there."""
        sender = self._forward.sender
        if isinstance(sender, FreeSender):
            self._saying(lambda: sender.offer(message))

    def _saying(self, say: Callable[[], None]) -> None:
        """Say something to the rank above; that it has left is no error."""
        assert self._above is not None
        self._peers.saying(self._above, say)

    def pass_on_end(self, micro_batch: int, reason: str | None = None) -> None:
        sender = self._forward.sender
        if sender is not None:
            self._saying(lambda: sender.send_end(micro_batch, reason))

    def wait_until_taken(self, *channels: str, timeout: float | None = None) -> None:
        # Training's own messages are taken in by a thread of the neighbour's, or dropped.
        super().wait_until_taken(*(channels or [name for name in self.channels if name not in TRAINING]), timeout=timeout)

    def leave(self, timeout: float | None = None) -> None:
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        self._peers.leave(max(0.0, end - time.monotonic()))
        super().wait_until_taken(timeout=max(0.0, end - time.monotonic()))

    def pending(self) -> dict[str, dict[int, list[Message]]]:
        """Nothing is on its way any more: all of it lies in the rings."""
        self.pass_mark()
        return {kind: {s: [] for s in range(self.bottom, self.top + 1)} for kind in ("activations", "gradients")}

    def report(self, k: int) -> dict[str, Any]:
        found = super().report(k)
        if self.bottom in found["rings"]:
            found["rings"][self.bottom]["idle"] = self.idle
        sender = self._forward.sender
        return {**found, "unsent": sender.dropped if isinstance(sender, FreeSender) else 0}


def _nothing(message: Message | Packed) -> None:
    """Nobody takes it."""
