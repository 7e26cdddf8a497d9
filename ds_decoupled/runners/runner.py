"""What every runner can do, and how one action is carried out, whoever decided that it is due.

One action's way::

    runner.act(action) --> watchers' before
        computes --> worker.act: queue --> stage --> queues      (watchers' acted)
        sends    --> network.send: queue --> channel
        receives --> network.receive: channel --> queue
    --> watchers' after
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from ds_decoupled.errors import PeerError, one_line
from ds_decoupled.feed import MicroBatch
from ds_decoupled.network import Network
from ds_decoupled.schedules import Action, Plan
from ds_decoupled.schedules.asynchronous import OwnPace
from ds_decoupled.stages.worker import Worker
from ds_decoupled.watchers.watcher import Watcher


@dataclass(frozen=True)
class DataEnd:
    """The data ended.

    Attributes:
        micro_batch: the first that will not come.
        error: why, where it was not the data's own end.
    """

    micro_batch: int
    error: Exception | None = None

    @property
    def reason(self) -> str | None:
        """Why, in one line for other ranks."""
        if self.error is None:
            return None
        return self.error.reason if isinstance(self.error, PeerError) else one_line(self.error)


#: Gives the next so many micro-batches, or why there are none: ``StopIteration``, or what the data failed with.
Fetch = Callable[[int], list[MicroBatch] | Exception]


class Runner(ABC):
    """Carries out a rank's actions, in the order that a subclass finds.

    Args:
        plan, rank: the method on its placement, and this rank's place on the pipe axis.
        workers: this rank's, by stage.
        network: its links.
        watchers: are told of every action.
        flush: whether every call ends with an empty pipeline.
        execute: runs a ``PipeSchedule``: DeepSpeed's own loop over instructions, which calls :meth:`act`.
        fetch: on ranks that read data; None elsewhere.
        pace: how stages go at their own, where the pace is not ``ticks``.

    Attributes:
        first: the run's first micro-batch over the whole training. A run lasts from the start, or from a drain, to the next.
        end: where the data of this run ended, once that is known.
        network_class: the links that it works with.
    """

    network_class: ClassVar[type[Network]] = Network

    def __init__(self, plan: Plan, rank: int, *, workers: Mapping[int, Worker], network: Network,
                 watchers: Sequence[Watcher], flush: bool, execute: Callable[[Any], None], fetch: Fetch | None,
                 pace: OwnPace) -> None:
        self.plan, self.rank, self.flush = plan, rank, flush
        self.workers, self.network, self.watchers = workers, network, watchers
        self.execute, self.fetch, self.pace = execute, fetch, pace
        self.first = 0
        self.end: DataEnd | None = None

    @abstractmethod
    def train(self) -> DataEnd | None:
        """Feed k new micro-batches and do all that is due meanwhile. Returns where the data ended, if they have."""

    @abstractmethod
    def drain(self) -> None:
        """Finish every micro-batch in flight."""

    def pause(self) -> None:  # noqa: B027  (most act in no background)
        """Wait until nothing acts in the background: weights and records are about to be read. Raises what failed there."""

    def settle(self) -> None:  # noqa: B027
        """As :meth:`pause`, whether or not something failed: weights and records are about to be replaced."""

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Within, all data-parallel replicas have the weights that stand for the model. A collective call."""
        yield

    def told(self) -> str:
        """What the log says of it beside the loss."""
        return ""

    def report(self) -> dict[str, Any]:
        """Entries for ``decoupled_summary`` of a runner that has all stages."""
        return {}

    @property
    @abstractmethod
    def in_flight(self) -> int:
        """Micro-batches that have been fed and are not yet through every stage."""

    @property
    @abstractmethod
    def through(self) -> int:
        """Every micro-batch before this one is through every stage, on every rank that is where this one is."""

    @property
    def at_rest(self) -> bool:
        """Whether nothing has been done since the start of the run."""
        return self.rests(self.state_dict())

    @abstractmethod
    def state_dict(self) -> Any:
        """Where the run is; the same on every rank between two calls."""

    @abstractmethod
    def load_state_dict(self, state: Any) -> None:
        """The inverse of :meth:`state_dict`."""

    @abstractmethod
    def rests(self, state: Any) -> bool:
        """Whether ``state``, as :meth:`state_dict` gives it, has nothing in flight."""

    @property
    @abstractmethod
    def next_micro_batch(self) -> int:
        """The next new one, over the whole training."""

    @abstractmethod
    def sent_up(self) -> int:
        """Micro-batches of the run that this rank has sent to the next rank."""

    # -- one action -------------------------------------------------------------------------------------------------------

    def act(self, action: Action) -> None:
        """Carry out one action, unless the data ended before it."""
        # A rank that has learned of the end goes on through its list: what came before the end still has to go its way.
        if not self.due(action):
            return
        for watcher in self.watchers:
            watcher.before(action)
        if action.kind.computes:
            self.workers[action.stage].act(action.kind, action.micro_batch)
        elif action.kind.is_send:
            self.network.send(action)
        elif (end := self.network.receive(action)) is not None:
            self.data_ended(DataEnd(*end))
        for watcher in self.watchers:
            watcher.after(action)

    def due(self, action: Action) -> bool:
        """Whether the action's micro-batch (of an update the last of its k) is one that the data have."""
        if self.end is None:
            return True
        m = action.micro_batch
        return (self.first + (m + 1) * self.plan.k - 1 if action.kind.per_update else m) < self.end.micro_batch

    def data_ended(self, end: DataEnd) -> None:
        """The next rank learns it at once. What came before goes its way."""
        if self.end is None:
            self.end = end
            self.network.pass_on_end(end.micro_batch, end.reason)
