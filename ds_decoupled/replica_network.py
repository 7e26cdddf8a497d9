"""Links among the data-parallel replicas of a model whose threads run free.

::

    replica i --[layers, differences, failures, "left"]--> thread of replica j: answers     a link each way, for each pair
    replica i <----------- collective calls ------------> replica j                         waits can be broken off

What is exchanged is :mod:`ds_decoupled.links.exchange`'s business. Without replicas there are no such links.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_decoupled.collectives import error_of_group
from ds_decoupled.errors import LinkError, PeerError
from ds_decoupled.links import Codecs, Message
from ds_decoupled.links.free import FreeReceiver, FreeSender
from ds_decoupled.links.peers import Peers, wait_for
from ds_decoupled.network import Network

#: A replica may be as slow as it likes; who is gone is noticed at once.
_FOREVER = timedelta(days=365)
#: Seconds in which a replica has heard of a failure.
_HEARD = 1.0


class ReplicaReceiver(FreeReceiver):
    """Takes in what one replica says."""

    whose = "replica"


class ReplicaNetwork(Network):
    """One rank's links; the pipe has no other.

    Attributes:
        changed: is told of whatever comes.
        replica: this one's number, of ``count``.
        senders: to the other replicas, by number.
        own_failure: of this one's threads, if one has failed; whoever waits for others is to raise it.
    """

    # Threads of the host wait for messages, and a receive of NCCL would hold processors of the device as long.
    backend = "gloo"

    def __init__(self, grid: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(grid, *args, **kwargs)
        self.changed = threading.Condition()
        self.replica, self.count = grid.get_data_parallel_rank(), grid.get_data_parallel_world_size()
        self.receivers: dict[int, ReplicaReceiver] = {}
        self.senders: dict[int, FreeSender] = {}
        self._deliver: Callable[[int, Message], None] = lambda replica, message: None
        self.own_failure: Callable[[], BaseException | None] = lambda: None
        self._control: Any = None  # of the main thread's calls
        self._gradients: Any = None  # of the communication thread's
        links: Any = None
        for ranks in grid.dp_groups if self.count > 1 else ():
            made = [dist.new_group(ranks, backend=self.backend, timeout=_FOREVER) for _ in range(3)]
            if grid.global_rank in ranks:
                links, self._control, self._gradients = made
                self._ranks = list(ranks)
        for number, rank in enumerate(self._ranks if self.count > 1 else ()):
            if number != self.replica:
                self.receivers[number] = ReplicaReceiver(rank, links, self.device, Codecs(), self._taker(number), self.changed)
                self.senders[number] = FreeSender(rank, links, self.device, Codecs(), self.timeout, room=0)
        self._peers = Peers(self.changed, [(self.receivers[number], self.senders[number]) for number in self.senders])

    def _taker(self, number: int) -> Callable[[Any], None]:
        return lambda message: self._deliver(number, message)

    def begin(self, deliver: Callable[[int, Message], None]) -> None:
        """From now on what comes is taken in: ``deliver`` is called with the replica's number and its message, by a thread."""
        self._deliver = deliver
        self._peers.begin()

    # -- one by one -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def open_to(self, replica: int) -> Iterator[bool]:
        """Within, farewell is not said to a replica; gives whether it was not yet."""
        with self.senders[replica].staying() as staying:
            yield staying

    def tell(self, replica: int, message: Message) -> None:
        """Send to one replica; never waits. That it has left is no error."""
        self._peers.saying(self.receivers[replica], lambda: self.senders[replica].send(message))

    @property
    def there(self) -> list[int]:
        """The other replicas, but for those that have left."""
        gone = self._peers.gone
        return [number for number, rank in enumerate(self._ranks) if number in self.senders and rank not in gone]

    def check(self) -> None:
        """Raises what a thread here, or another replica, failed with, if one did."""
        own = self.own_failure()
        if own is not None:
            raise own
        self._peers.check()

    def _check_there(self) -> None:
        self.check()
        gone = self._peers.gone
        if gone:
            raise LinkError(f"replica {self.replica} was waiting for all replicas, and replica {self._ranks.index(gone[0])} "
                            "has left")

    # -- all together ---------------------------------------------------------------------------------------------------------

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of all replicas' ``values``, on any device, in the host's memory. A collective call of main threads."""
        return self._reduce(values, dist.ReduceOp.SUM, self._control, self._check_there)

    def add_up_gradients(self, values: Tensor, check: Callable[[], None]) -> Tensor:
        """The same, of communication threads.

        Args:
            check: raises why it is of no use to wait any longer; a failure, and that a replica has left, are seen anyway.
        """
        def look() -> None:
            check()
            self._check_there()

        return self._reduce(values, dist.ReduceOp.SUM, self._gradients, look)

    def most(self, number: int, finishing: bool = True) -> int:
        """The largest of all replicas' numbers. A collective call of main threads.

        Args:
            finishing: whether what was fed is to be finished, or more is to be fed. Ctrl-C may have ended a call that feeds on
                one replica alone: those who feed wait until all feed or all finish, and so do those who finish.
        """
        while True:
            told = torch.tensor([number, int(finishing), int(not finishing)])
            largest, some_finish, some_feed = self._reduce(told, dist.ReduceOp.MAX, self._control, self._check_there).tolist()
            if not (some_finish and some_feed):
                return int(largest)

    def _reduce(self, values: Tensor, op: Any, group: Any, check: Callable[[], None]) -> Tensor:
        values = values.cpu()
        wait_for(dist.all_reduce(values, op, group=group, async_op=True), check,
                 f"replica {self.replica} was waiting for all replicas, and one is gone")
        return values

    def meet(self) -> None:
        """Wait until all replicas are here. A collective call."""
        self.most(0)

    def agree_replicas(self, error: Exception | None) -> Exception | None:
        """``error``, or why another replica has no data. A collective call."""
        if not self.most(0 if error is None else 1, finishing=False):
            return None
        return error_of_group(error, self._control, torch.device("cpu"))  # all are here

    # -- as other networks ----------------------------------------------------------------------------------------------------

    def tell_failure(self, rank: int, reason: str) -> None:
        """As a :class:`Network`; what the other replicas learn is which of them failed."""
        failure = self._peers.failure
        number = failure.rank if isinstance(failure, PeerError) else self.replica
        if not self.failed:
            for sender in self.senders.values():
                with suppress(LinkError):
                    sender.send_failure(number, reason)
            for sender in self.senders.values():
                with suppress(LinkError):
                    sender.wait_until_taken(_HEARD)
        super().tell_failure(rank, reason)

    def leave(self, timeout: float | None = None) -> None:
        self._peers.leave(self.timeout if timeout is None else timeout)
        super().leave(timeout)

    def report(self, k: int) -> dict[str, Any]:
        found = super().report(k)
        return {**found, "bytes": found["bytes"] + sum(sender.bytes_sent for sender in self.senders.values()),
                "messages": found["messages"] + sum(sender.messages_sent for sender in self.senders.values())}
