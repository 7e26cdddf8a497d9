"""What a simulated run costs, and what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import Kind


@dataclass(frozen=True)
class Costs:
    """What actions and links cost, in any one unit of time.

    Attributes:
        kinds: cost of an action by kind, on every stage; what is left out costs what :mod:`ds_decoupled.schedules.kinds`
            says, and the weights' own gradients (``W``) as much as the stage's forward pass. A backward pass whose weights'
            gradients are put off costs so much less.
        stages: cost by ``(stage, kind)``, where a stage differs (for example a measured time).
        link: time from a send to the message's arrival on another rank.
        message_bytes: bytes of one activation, and of its gradient.
    """

    kinds: Mapping[Kind, float] = field(default_factory=dict)
    stages: Mapping[tuple[int, Kind], float] = field(default_factory=dict)
    link: float = 0.0
    message_bytes: float = 1.0

    def of(self, stage: int, kind: Kind) -> float:
        """The cost of one action of ``stage``."""
        if (stage, kind) in self.stages:
            # A measured time of one stage goes before what all stages are said to cost.
            return float(self.stages[stage, kind])
        if kind in self.kinds:
            return float(self.kinds[kind])
        return float(kind.cost) if kind.cost_like is None else self.of(stage, kind.cost_like)


@dataclass(frozen=True, slots=True)
class Event:
    """One computation in the timeline, from ``start`` to ``end`` in units of the costs."""

    rank: int
    tick: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one link between ranks carries in one direction over a run. Link ``s`` joins stages ``s`` and ``s + 1``."""

    link: int
    direction: str
    messages: int
    bytes: float


@dataclass(frozen=True)
class Simulation:
    """What a run did. Tuples have one entry per rank or per stage, in order.

    Attributes:
        micro_batches: how many the run had.
        total_time: from the first action to the last, fill and drain included.
        time_per_micro_batch: in the steady state; None where the run is too short to have one.
        busy: time that each rank computed.
        delays: ticks between a stage's forward and backward of one micro-batch, the most over the run.
        updates_crossed: updates of the stage between the two, the most over the run.
        records: micro-batches in flight at a stage, the most over the run.
        traffic: one entry per link and direction that carried anything, links in order, forward first.
        events: every computation, rank by rank.
    """

    micro_batches: int
    total_time: float
    time_per_micro_batch: float | None
    busy: tuple[float, ...]
    delays: tuple[int, ...]
    updates_crossed: tuple[int, ...]
    records: tuple[int, ...]
    traffic: tuple[Traffic, ...]
    events: tuple[Event, ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """Share of the whole run that each rank waited, fill and drain included."""
        return tuple(1 - b / self.total_time if self.total_time else 0.0 for b in self.busy)

    @property
    def steady_idle(self) -> tuple[float, ...] | None:
        """Share of the steady state that each rank waits; None where there is none."""
        if not self.time_per_micro_batch:
            return None
        steady = self.time_per_micro_batch * self.micro_batches
        return tuple(max(0.0, 1 - b / steady) for b in self.busy)

    @property
    def one_rank_time(self) -> float:
        """Time per micro-batch of one rank that does all the work of the run by itself."""
        return sum(self.busy) / self.micro_batches
