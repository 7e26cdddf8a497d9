"""Run a plan without tensors: deadlocks, time, delays, records in flight, and what the links carry.

>>> from ds_decoupled.schedules import Placement, Plan
>>> petra = Plan.make(Placement.of(4, 4), hops=(1, 1), k=1, recover="reconstruct", flush=False)
>>> simulate(petra, 40).delays
(6, 4, 2, 0)

Each rank works through its own list in order. A send does not block; a receive waits for its message, which arrives one
link time after it was sent. Nothing here uses the formulas of :mod:`ds_decoupled.schedules.ticks`: every number is
counted from the actions, so that a test can compare the two.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from ds_decoupled.analysis.simulation import Costs, Event, Simulation, Traffic
from ds_decoupled.analysis.staircase import Lists, staircase
from ds_decoupled.errors import PlanError
from ds_decoupled.schedules.actions import Action
from ds_decoupled.schedules.kinds import Kind, Slot, matching
from ds_decoupled.schedules.plan import Plan

#: What lies in a slot, and where: its direction (or its name), the link or stage, and the micro-batch.
Item = tuple[str, int, int]
_PUT_OFF = Slot.PUT_OFF.name


def simulate(plan: Plan, micro_batches: int, costs: Costs | None = None) -> Simulation:
    """Run ``plan`` over fill, steady state and drain.

    Args:
        plan: what to run.
        micro_batches: how many; the steady state shows from about three times ``plan.ticks.drain``.
        costs: of actions and links; one unit per forward pass by default.

    Raises:
        PlanError: a deadlock, a message out of order, or an action without what it needs.
    """
    lists = [list(plan.run(rank, micro_batches)) for rank in range(plan.placement.ranks)]
    return play(lists, plan.placement.rank_bounds, costs)


def play(lists: Lists, rank_bounds: Sequence[int], costs: Costs | None = None) -> Simulation:
    """Run lists of actions, ``lists[rank][tick]``, as :func:`simulate` does; ``rank_bounds`` are P+1 stage indices."""
    return _Run(lists, tuple(rank_bounds), costs or Costs()).play()


@dataclass(slots=True)
class _Message:
    kind: Kind
    micro_batch: int
    arrival: float


def _item(slot: Slot, action: Action) -> Item:
    """What lies in ``slot`` for ``action``."""
    return slot.travels or slot.name, slot.link(action.stage), action.micro_batch


class _Rank:
    """Where one rank is: its next action, its clock, and what it holds."""

    def __init__(self, ticks: Sequence[Sequence[Action]]) -> None:
        self.todo = [(tick, action) for tick, actions in enumerate(ticks) for action in actions]
        self.next = 0
        self.clock = self.busy = 0.0
        self.held: Counter[Item] = Counter()  # several gradients of one micro-batch, of several losses
        self.tick_ends = [0.0] * len(ticks)

    def take(self, item: Item) -> bool:
        """Whether it was there."""
        if not self.held[item]:
            return False
        self.held[item] -= 1
        return True

    @property
    def current(self) -> tuple[int, Action] | None:
        return self.todo[self.next] if self.next < len(self.todo) else None


class _Run:
    """The state of one simulation."""

    def __init__(self, lists: Lists, rank_bounds: tuple[int, ...], costs: Costs) -> None:
        self.lists, self.rank_bounds, self.costs = lists, rank_bounds, costs
        self.stages = rank_bounds[-1]
        self.rank_of_stage = [r for r, (a, b) in enumerate(pairwise(rank_bounds)) for _ in range(a, b)]
        if len(lists) != len(rank_bounds) - 1:
            raise PlanError(f"{len(lists)} lists of actions for {len(rank_bounds) - 1} ranks")
        self.ranks = [_Rank(ticks) for ticks in lists]
        self.queues: dict[tuple[int, str], deque[_Message]] = {}
        self.messages: Counter[tuple[int, str]] = Counter()
        self.payloads: Counter[tuple[int, str]] = Counter()
        #: For each (stage, micro-batch) in flight: the tick of its forward, and the stage's updates until then.
        self.in_flight: list[dict[int, tuple[int, int]]] = [{} for _ in range(self.stages)]
        #: What some action is still to take.
        self.wanted = Counter(_item(a.kind.takes, a) for ticks in lists for actions in ticks for a in actions
                              if a.kind.computes and a.kind.takes is not None)
        self.updates = [0] * self.stages
        self.delays, self.crossed, self.records = [0] * self.stages, [0] * self.stages, [0] * self.stages
        self.finished: Counter[int] = Counter()
        self.events: list[list[Event]] = [[] for _ in lists]

    def play(self) -> Simulation:
        moved = True
        while moved:
            moved = False
            for r in range(len(self.ranks)):
                while self._step(r):
                    moved = True
        if any(rank.current for rank in self.ranks):
            self._deadlock()
        self._check_nothing_left()
        traffic = tuple(Traffic(link, direction, self.messages[link, direction],
                                self.payloads[link, direction] * self.costs.message_bytes)
                        for link, direction in sorted(self.messages, key=lambda key: (key[0], key[1] == "backward")))
        return Simulation(self.finished[0], max(rank.clock for rank in self.ranks), self._time_per_micro_batch(),
                          tuple(rank.busy for rank in self.ranks), tuple(self.delays), tuple(self.crossed),
                          tuple(self.records), traffic, tuple(event for events in self.events for event in events))

    def _step(self, r: int) -> bool:
        """Let rank ``r`` do its next action; False if it is done or has to wait for a message that nobody sent yet."""
        rank = self.ranks[r]
        if rank.current is None:
            return False
        tick, action = rank.current
        if not 0 <= action.stage < self.stages or self.rank_of_stage[action.stage] != r:
            self._broken(r, f"stage {action.stage} is not on this rank")
        if action.kind.is_recv:
            if not self._receive(r, action):
                return False
        elif action.kind.is_send:
            self._send(r, action)
        else:
            self._compute(r, tick, action)
        rank.next += 1
        rank.tick_ends[tick] = rank.clock
        return True

    # Messages

    def _queue(self, action: Action) -> tuple[int, str]:
        """The link and direction that a send or receive uses."""
        slot = action.kind.takes or action.kind.gives[0]
        assert slot.travels is not None
        return slot.link(action.stage), slot.travels

    def _receive(self, r: int, action: Action) -> bool:
        rank, key = self.ranks[r], self._queue(action)
        queue = self.queues.get(key)
        if not queue:
            return False
        head = queue.popleft()
        if head.micro_batch != action.micro_batch or matching(head.kind) is not action.kind:
            self._broken(r, f"the next message on link {key[0]} {key[1]} is a {head.kind.letter} of micro-batch "
                            f"{head.micro_batch}")
        rank.clock = max(rank.clock, head.arrival)
        for slot in action.kind.gives:
            rank.held[_item(slot, action)] += 1
        return True

    def _send(self, r: int, action: Action) -> None:
        rank, key = self.ranks[r], self._queue(action)
        assert action.kind.takes is not None
        if not 0 <= key[0] < self.stages - 1 or self.rank_of_stage[key[0]] == self.rank_of_stage[key[0] + 1]:
            self._broken(r, "no link between two ranks there")
        if not rank.take(_item(action.kind.takes, action)):
            self._broken(r, "what it sends has not been computed")
        message = _Message(action.kind, action.micro_batch, rank.clock + self.costs.link)
        self.queues.setdefault(key, deque()).append(message)
        self.messages[key] += 1
        self.payloads[key] += action.kind.payload

    # Computation

    def _compute(self, r: int, tick: int, action: Action) -> None:
        rank, s, kind, m = self.ranks[r], action.stage, action.kind, action.micro_batch
        start = rank.clock
        cost = self.costs.of(s, kind)
        if Slot.PUT_OFF in kind.gives and self.wanted[_PUT_OFF, s, m]:
            cost = max(0.0, cost - self.costs.of(s, Kind.WEIGHTS))
        rank.clock += cost
        rank.busy += cost
        if kind is Kind.UPDATE:
            if m != self.updates[s]:
                self._broken(r, f"the stage's next update is number {self.updates[s]}")
            if any(count and what == _PUT_OFF and stage == s for (what, stage, _), count in rank.held.items()):
                self._broken(r, "weights' gradients that were put off are still missing")
            self.updates[s] += 1
        if kind.takes not in (None, Slot.BATCH) and not rank.take(_item(kind.takes, action)):
            self._broken(r, self._missing(kind.takes, s))
        if kind.begins:
            self.in_flight[s][m] = (tick, self.updates[s])
            self.records[s] = max(self.records[s], len(self.in_flight[s]))
        if kind.ends:
            self._backward(r, tick, action)
        for slot in kind.gives:
            self._give(rank, slot, action)
        self.events[r].append(Event(r, tick, action, start, rank.clock))

    def _give(self, rank: _Rank, slot: Slot, action: Action) -> None:
        item = _item(slot, action)
        if slot.travels == "forward":
            rank.held[item] += slot.link(action.stage) < self.stages - 1
        elif self.wanted[item]:  # the first ones go down: a window's last loss is beyond the window of the stage below
            self.wanted[item] -= 1
            rank.held[item] += 1

    @staticmethod
    def _missing(slot: Slot, stage: int) -> str:
        if slot is Slot.PUT_OFF:
            return "the backward pass has not run"
        return "the micro-batch has not been loaded" if slot.link(stage) < 0 else f"{slot.value} is not there"

    def _backward(self, r: int, tick: int, action: Action) -> None:
        s, m = action.stage, action.micro_batch
        if m not in self.in_flight[s]:
            self._broken(r, "the stage has not run this micro-batch forward")
        forward_tick, updates = self.in_flight[s].pop(m)
        self.delays[s] = max(self.delays[s], tick - forward_tick)
        self.crossed[s] = max(self.crossed[s], self.updates[s] - updates)
        self.finished[s] += 1

    # The steady state

    def _time_per_micro_batch(self) -> float | None:
        """The period of rank 0's ticks between its first backward and its last forward.

        Up to a tick that is full on rank 0, no rank lacked work that it has in an endless run, whatever came after. The
        times repeat with some number of ticks (the length of the slowest circle of waits), found in the second half.
        """
        backwards = [e.tick for e in self.events[0] if e.action.stage == 0 and e.action.kind.ends]
        forwards = [e.tick for e in self.events[0] if e.action.stage == 0 and e.action.kind.begins]
        if not backwards:
            return None
        ends = self.ranks[0].tick_ends[min(backwards):max(forwards) + 1]
        last = len(ends) - 1
        for period in range(1, len(ends) // 4 + 1):
            step = ends[last] - ends[last - period]
            if all(abs(ends[i] - ends[i - period] - step) < 1e-9 * (1 + step) for i in range(last // 2 + 1, last)):
                return step / period
        # Still settling: the second half is nearer to the steady state than the first.
        return (ends[last] - ends[last // 2]) / (last - last // 2) if last > 0 else None

    # Errors

    def _broken(self, r: int, why: str) -> NoReturn:
        current = self.ranks[r].current
        assert current is not None
        tick, action = current
        raise PlanError(f"rank {r}, tick {tick}: {action} cannot run: {why}\n{self._picture({(tick, action.stage)})}")

    def _deadlock(self) -> NoReturn:
        lines, marked = ["deadlock: every rank that is not done waits for a message"], set()
        for r, rank in enumerate(self.ranks):
            if rank.current is None:
                continue
            tick, action = rank.current
            marked.add((tick, action.stage))
            lines.append(f"rank {r} waits for {action} in tick {tick} ({action.kind.carries} of micro-batch "
                         f"{action.micro_batch}), {self._sender(action)}")
        raise PlanError("\n".join(lines) + "\n" + self._picture(marked))

    def _sender(self, action: Action) -> str:
        link, direction = self._queue(action)
        sent = Action(link if direction == "forward" else link + 1, matching(action.kind), action.micro_batch)
        for r, rank in enumerate(self.ranks):
            for tick, later in rank.todo[rank.next:]:
                if later == sent:
                    return f"sent by nobody yet: rank {r} sends {sent} in tick {tick}"
        return "sent by nobody"

    def _picture(self, marked: set[tuple[int, int]]) -> str:
        """The staircase around the marked cells."""
        first = max(0, min(tick for tick, _ in marked) - 4)
        marked = {(tick, stage) for tick, stage in marked if 0 <= stage < self.stages}
        return staircase(self.lists, self.rank_bounds, first=first,
                         ticks=max((tick for tick, _ in marked), default=first) - first + 3, marked=marked)

    def _check_nothing_left(self) -> None:
        for (link, direction), queue in self.queues.items():
            if queue:
                raise PlanError(f"{len(queue)} messages on link {link} {direction} were never received, the first of "
                                f"micro-batch {queue[0].micro_batch}")
        for r, rank in enumerate(self.ranks):
            left = [item for item, count in rank.held.items() if count]
            if left:
                what, where, m = min(left, key=lambda item: (item[0] != "forward", item[0] != "backward", item))
                names = {"forward": "the activation" if where >= 0 else "a loaded micro-batch",
                         "backward": "the gradient of the activation"}
                name = names[what] if what in names else Slot[what].value
                raise PlanError(f"rank {r} ends with {name} of stage {max(0, where)} that nobody used: micro-batch {m}")
        for s, flight in enumerate(self.in_flight):
            if flight:
                raise PlanError(f"stage {s} never ran micro-batch {min(flight)} backward")

