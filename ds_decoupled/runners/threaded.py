"""Pace ``free`` with layer-wise updates: threads that go forward, threads that go back, and nobody waits for an update.

PD-ASGD (arXiv 2410.05985)::

    train_batch --[inbox]--> forward threads --[queue]--> backward threads: stage J-1, its update, stage J-2, its update, ...

A forward thread waits for data, or for room where the backward threads do not keep up, and for nothing else. A backward thread
takes one lock a stage, for as long as it hands the stage's gradient over and steps; or none, with ``"lock": "none"``. Every
micro-batch in flight has copies of the layers over the same memory (:mod:`ds_decoupled.stages.slots`), so that a pass finds the
weights as they are.
:mod:`ds_decoupled.runners.layerwise` is the same on a virtual clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor

from ds_decoupled.errors import ConfigError
from ds_decoupled.feed import MicroBatch
from ds_decoupled.optim import Hand, check_lock_free
from ds_decoupled.runners.crew import Crew
from ds_decoupled.runners.runner import DataEnd, Runner
from ds_decoupled.runners.streams import Streams
from ds_decoupled.schedules import Action, Kind, Slot
from ds_decoupled.schedules.layerwise import Threads
from ds_decoupled.stages.outcome import Outcome
from ds_decoupled.stages.threaded import ThreadedStage
from ds_decoupled.stages.worker import Worker
from ds_decoupled.watchers import Breakdown

#: Micro-batches that are timed to find out how many backward threads there should be; the first of all is not one of them.
_TIMED = 3


class ThreadedRunner(Runner):
    """Feeds the threads, and waits for them where somebody has to.

    A call of ``train_batch`` is over when the forward threads have taken, or are about to take, its k micro-batches.

    Attributes:
        crew: the threads; None until it is known how many there are.
        turns: gradients that each stage has got since its last update.
        overlaps: updates of each stage that began while another one was under way, without locks: of these a part may be lost.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check()
        self.device = self.network.device
        self.stages = {s: cast(ThreadedStage, worker.stage) for s, worker in self.workers.items()}
        self._locks = {s: threading.Lock() for s in self.workers}
        self._watching = threading.RLock()  # watchers hear of one thing at a time
        self._streams = Streams(self.device, self.workers)
        self.turns = dict.fromkeys(self.workers, 0)
        self.overlaps = dict.fromkeys(self.workers, 0)
        self._under_way = dict.fromkeys(self.workers, 0)
        self._hands = threading.local()
        self._fed = 0
        self._seconds = [0.0, 0.0]  # of timed forward and backward passes
        top = self.workers[max(self.workers)]
        assert top.tell_loss is not None
        self._tell, self._losses = top.tell_loss, list[Tensor]()
        top.tell_loss = self._losses.append  # one that comes between two calls is the next call's
        backward = self.pace.threads.backward
        self.crew = None if backward is None else self._crew(backward)

    def _check(self) -> None:
        """What threads cannot do. Raises :class:`ConfigError`."""
        module = getattr(next(iter(self.workers.values())).stage.shared.additional_losses, "__self__", None)
        if isinstance(module, PipelineModule) and \
                type(module).get_additional_losses is not PipelineModule.get_additional_losses:
            raise ConfigError("get_additional_losses", type(module).__name__, "the module is asked for the losses of its last "
                              "forward pass, and threads are at several", 'Leave it out, or take "pace": "clock".')
        if self.network.replicas is not None:
            raise ConfigError("decoupled.pace", "free", "replicas would have to average each stage's gradients, and their "
                              "threads come to no common order", 'Take one replica, or "pace": "clock".')
        if any(isinstance(watcher, Breakdown) for watcher in self.watchers):
            raise ConfigError("wall_clock_breakdown", True, "several threads act at the same time, and one's seconds would be "
                              "those of others", "Leave it out; decoupled_summary() has the busy share of each thread.")
        if any(worker.stage.seeds.own is not None for worker in self.workers.values()):
            raise ConfigError("seed_layers", True, "threads draw from the same generators, and a seed that one sets another "
                              'overwrites', 'Leave it out, or take "pace": "clock".')

        if not self.pace.threads.locked:
            if self.plan.k > 1:
                raise ConfigError("decoupled.threads.lock", "none", f"k = {self.plan.k} gradients are added up between two "
                                  "updates, and not by several threads at once", 'Take "gradient_accumulation_steps": 1, or '
                                  '"lock": "layer".')
            for worker in self.workers.values():
                check_lock_free(worker.optimizer)

    def _crew(self, backward: int) -> Crew:
        threads = self.pace.threads
        return Crew((threads.forward, backward), threads.queue, self._forward, self._backward, self._thread,
                    self.network.timeout)

    # -- a runner's calls ---------------------------------------------------------------------------------------------------

    def train(self) -> DataEnd | None:
        assert self.fetch is not None  # one pipe rank
        if self.end is None:
            fetched = self.fetch(self.plan.k)
            if isinstance(fetched, Exception):
                self.end = DataEnd(self._fed, None if isinstance(fetched, StopIteration) else fetched)
            else:
                for parts in fetched:
                    self._feed(parts)
        self._tell_losses()
        return self.end

    def drain(self) -> None:
        if self.crew is not None:
            self.crew.rest()
        self._streams.join()
        self._tell_losses()
        self.end = None

    def pause(self) -> None:
        if self.crew is not None:
            self.crew.finish()
        self._streams.join()

    def settle(self) -> None:
        if self.crew is not None:
            self.crew.settle()
        self._streams.join()

    def _feed(self, parts: MicroBatch) -> None:
        item = self._fed, parts
        self._streams.begin(self._fed)
        if self.crew is not None:
            try:
                self.crew.put(item)
            except BaseException:  # Ctrl-C too: nobody has it
                self._streams.end(self._fed)
                raise
            self._fed += 1
            return
        self._fed += 1
        # One after the other, until it is known how long a backward pass is.
        with self._thread():
            begun = self._time()
            graph = self._forward(item)
            between = self._time()
            self._backward(graph)
            if item[0] > 0:
                self._seconds[0] += between - begun
                self._seconds[1] += self._time() - between
        if self._fed > _TIMED:
            self.crew = self._crew(Threads.for_ratio(self._seconds[1] / self._seconds[0]))
            self.crew.fed = self.crew.done = self._fed

    def _time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _tell_losses(self) -> None:
        self._streams.join()
        for _ in range(len(self._losses)):
            self._tell(self._losses.pop(0))

    # -- in the threads -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _thread(self) -> Iterator[None]:
        # Else all backward passes of a device share one thread.
        with torch.autograd.set_multithreading_enabled(False):
            self._streams.thread()
            yield

    def _forward(self, item: tuple[int, MicroBatch]) -> int:
        """All stages, upward."""
        m, (inputs, labels) = item
        parts: tuple[Any, ...] = (inputs, labels)
        with self._streams.of(m):
            for s, worker in self.workers.items():
                action = Action(s, Kind.FORWARD, m)
                self._tell_before(action)
                outcome = worker.stage.act(Kind.FORWARD, m, *parts)
                if self.watchers:
                    with self._watching:
                        worker.settle(Kind.FORWARD, m, outcome)
                self._tell_after(action)
                parts = outcome.given.get(Slot.OUTPUT, ())
        return m

    def _backward(self, m: int) -> None:
        """All stages, downward; each steps when its gradient is there."""
        parts: tuple[Any, ...] = ()
        with self._streams.of(m):
            for s, worker in reversed(list(self.workers.items())):
                action = Action(s, Kind.BACKWARD, m)
                self._tell_before(action)
                outcome = worker.stage.act(Kind.BACKWARD, m, *parts)
                self._learn(s, worker, m, outcome)
                self._tell_after(action)
                parts = outcome.given.get(Slot.INPUT_GRADIENT, ())
        self._streams.end(m)

    def _learn(self, stage: int, worker: Worker, m: int, outcome: Outcome) -> None:
        """The gradient of ``m`` is there: hand it over, and step if it is the k-th."""
        with self._locks[stage], self._streams.turn(stage), self._watching if self.watchers else nullcontext():
            # The first update makes what the optimizer keeps beside the weights.
            if self.pace.threads.locked or not worker.optimizer.updates:
                self.stages[stage].hand_over(m)
                worker.settle(Kind.BACKWARD, m, outcome)
                self._update_if_due(stage, worker)
                return
        self._update_freely(stage, worker, m, outcome)

    def _update_if_due(self, stage: int, worker: Worker) -> None:
        self.turns[stage] += 1
        if self.turns[stage] == self.plan.k:
            self.turns[stage] = 0
            action = Action(stage, Kind.UPDATE, worker.optimizer.updates)
            self._tell_before(action)
            worker.act(Kind.UPDATE, action.micro_batch)
            self._tell_after(action)

    def _update_freely(self, stage: int, worker: Worker, m: int, outcome: Outcome) -> None:
        """An update beside others of the stage; what counts them has its lock."""
        hands: dict[int, Hand] = self._hands.__dict__.setdefault("of", {})
        if stage not in hands:
            hands[stage] = Hand(worker.optimizer)  # this thread's
        with self._locks[stage], self._watching if self.watchers else nullcontext():
            self.overlaps[stage] += self._under_way[stage] > 0
            self._under_way[stage] += 1
            gradients = self.stages[stage].gradients(m)
            worker.settle(Kind.BACKWARD, m, outcome)
        hands[stage].step(gradients)
        with self._locks[stage], self._watching if self.watchers else nullcontext():
            self._under_way[stage] -= 1
            action = Action(stage, Kind.UPDATE, worker.optimizer.updates)
            self._tell_before(action)
            made = worker.stage.act(Kind.UPDATE, action.micro_batch)
            worker.settle(Kind.UPDATE, action.micro_batch, replace(made, steps=False))
            worker.optimizer.stepped()
            self._tell_after(action)

    def _tell_before(self, action: Action) -> None:
        if self.watchers:
            with self._watching:
                for watcher in self.watchers:
                    watcher.before(action)

    def _tell_after(self, action: Action) -> None:
        if self.watchers:
            with self._watching:
                for watcher in self.watchers:
                    watcher.after(action)

    # -- where it is ----------------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return 0 if self.crew is None else self.crew.fed - self.crew.done

    @property
    def through(self) -> int:
        return self._fed - self.in_flight

    @property
    def next_micro_batch(self) -> int:
        return self._fed

    def state_dict(self) -> dict[str, Any]:
        self.pause()
        return {"fed": self._fed, "turns": dict(self.turns)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What is in flight, and what failed, is given up."""
        if self.crew is not None:
            self.crew.end()
            self.crew = self._crew(self.crew.threads[1])
        for stage in self.stages.values():
            stage.give_up()
        self._under_way = dict.fromkeys(self.workers, 0)
        self._streams = Streams(self.device, self.workers)
        self._losses.clear()
        self._fed, self.turns = state["fed"], dict(state["turns"])
        if self.crew is not None:
            self.crew.fed = self.crew.done = self._fed
        self.end = None

    def rests(self, state: dict[str, Any]) -> bool:
        return not any(state["turns"].values())

    def sent_up(self) -> int:
        return 0  # there is no other rank

    def report(self) -> dict[str, Any]:
        if self.crew is None:
            return {}
        forward, backward = self.crew.threads
        return {"threads": {"forward": forward, "backward": backward, "queue": self.crew.queue, **self.crew.report(),
                            **({} if self.pace.threads.locked else {"overlapping_updates": list(self.overlaps.values())})}}
