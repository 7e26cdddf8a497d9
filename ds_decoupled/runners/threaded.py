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

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from ds_decoupled.collectives import gather
from ds_decoupled.feed import MicroBatch
from ds_decoupled.links.allreduce import AllReduce
from ds_decoupled.links.exchange import Pairwise
from ds_decoupled.replica_network import ReplicaNetwork
from ds_decoupled.runners.crew import Crew
from ds_decoupled.runners.learner import Learner
from ds_decoupled.runners.replicas import begin, exchange_of
from ds_decoupled.runners.runner import DataEnd, Runner
from ds_decoupled.runners.streams import Streams
from ds_decoupled.runners.thread_checks import check_threads
from ds_decoupled.schedules import Action, Kind, Slot
from ds_decoupled.schedules.layerwise import Threads
from ds_decoupled.stages.outcome import Outcome
from ds_decoupled.stages.threaded import ThreadedStage

#: Micro-batches that are timed to find out how many backward threads there should be; the first of all is not one of them.
_TIMED = 3


class ThreadedRunner(Runner):
    """Feeds the threads, and waits for them where somebody has to.

    A call of ``train_batch`` is over when the forward threads have taken, or are about to take, its k micro-batches.

    Attributes:
        crew: the threads; None until it is known how many there are.
        learner: hands gradients over, and lets stages step.
        exchange: with data-parallel replicas; None for one. ``gradients``: the same where it is of gradients.
    """

    network: ReplicaNetwork
    network_class = ReplicaNetwork

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_threads(self.plan.k, self.workers, self.network, self.watchers, self.pace)
        self.device = self.network.device
        self.stages = {s: cast(ThreadedStage, worker.stage) for s, worker in self.workers.items()}
        self._streams = Streams(self.device, self.workers)
        self.learner = Learner(self.workers, self.watchers, self.pace.threads.locked, lambda: self.plan.k,
                               lambda stage: self._streams.turn(stage))
        self.exchange = exchange_of(self.pace.exchange, self.network, self.stages, self.learner.turn, self._use, self._fail)
        self.gradients = self.exchange if isinstance(self.exchange, AllReduce) else None
        self._fed = 0
        self._seconds = [0.0, 0.0]  # of timed forward and backward passes
        self._failure: BaseException | None = None  # of what works beside the passes, before there are threads
        top = self.workers[max(self.workers)]
        assert top.tell_loss is not None
        self._tell, self._losses = top.tell_loss, list[Tensor]()
        top.tell_loss = self._losses.append  # one that comes between two calls is the next call's
        backward = self.pace.threads.backward
        self.crew = None if backward is None else self._crew(backward)
        if self.exchange is not None:
            begin(self.exchange, self.network, self.workers, self._fail)
            self.network.own_failure = lambda: self._failure if self.crew is None else self.crew.failure

    def _crew(self, backward: int) -> Crew:
        threads = self.pace.threads
        return Crew((threads.forward, backward), threads.queue, self._forward, self._backward, self._thread,
                    self.network.timeout, self._let_go)

    # -- a runner's calls ---------------------------------------------------------------------------------------------------

    def train(self) -> DataEnd | None:
        assert self.fetch is not None  # one pipe rank
        self.network.check()
        if self.end is None:
            fetched = self.fetch(self.plan.k)
            if self.gradients is not None:  # replicas that wait for one another end together
                fetched = self.network.agree_replicas(fetched if isinstance(fetched, Exception) else None) or fetched
            if isinstance(fetched, Exception):
                self.end = DataEnd(self._fed, None if isinstance(fetched, StopIteration) else fetched)
            else:
                for parts in fetched:
                    self._feed(parts)
        self._tell_losses()
        return self.end

    def drain(self) -> None:
        self.pause()
        if self.crew is not None:
            self.crew.rest()
        if isinstance(self.exchange, Pairwise):
            self._take_mean()
        self._tell_losses()
        self.end = None

    def pause(self) -> None:
        if self.exchange is not None:
            self.exchange.before_finish(self._fed if self.crew is None else self.crew.fed)
        if self.crew is not None:
            self.crew.finish()
        if self.exchange is not None:
            self.exchange.quiet()
        self._streams.join()

    def settle(self) -> None:
        try:
            self.pause()
        except BaseException:
            if self.crew is None or self.crew.failure is None:  # Ctrl-C, it takes too long, or another replica has failed
                raise
            self.crew.end()
        self._streams.join()

    @contextmanager
    def as_one(self) -> Iterator[None]:
        own = {s: [tensor.clone() for tensor in stage.replicated()] for s, stage in self.stages.items() if stage.drifts}
        self._take_mean()
        yield
        for s, tensors in own.items():
            for tensor, kept in zip(self.stages[s].replicated(), tensors):
                tensor.copy_(kept)

    def _take_mean(self) -> None:
        """Replicas that have weights of their own all take the mean. A collective call, with nothing in flight."""
        for stage in self.stages.values():
            if stage.drifts and isinstance(self.exchange, Pairwise):
                self.exchange.mean(stage.replicated())

    def _let_go(self) -> None:
        if self.exchange is not None:
            self.exchange.stop()

    def _fail(self, error: BaseException) -> None:
        """What works for the threads has failed."""
        if self.crew is not None:
            self.crew.fail(error)
        else:
            self._failure = self._failure or error

    def _feed(self, parts: MicroBatch) -> None:
        item = self._fed, parts
        self._streams.begin(self._fed)
        if self.exchange is not None:
            self.exchange.start()
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
                self.learner.before(action)
                outcome = worker.stage.act(Kind.FORWARD, m, *parts)
                if self.watchers:
                    with self.learner.watching():
                        worker.settle(Kind.FORWARD, m, outcome)
                self.learner.after(action)
                parts = outcome.given.get(Slot.OUTPUT, ())
        return m

    def _backward(self, m: int) -> None:
        """All stages, downward; each steps when its gradient is there."""
        parts: tuple[Any, ...] = ()
        with self._streams.of(m):
            for s, worker in reversed(list(self.workers.items())):
                action = Action(s, Kind.BACKWARD, m)
                self.learner.before(action)
                outcome = worker.stage.act(Kind.BACKWARD, m, *parts)
                if self.gradients is not None:
                    self.gradients.give(s, m, outcome)
                elif self.learner.learn(s, m, outcome) and self.exchange is not None:
                    self.exchange.updated(s)
                self.learner.after(action)
                parts = outcome.given.get(Slot.INPUT_GRADIENT, ())
        if self.gradients is not None:
            self.gradients.wait(m)
        self._streams.end(m)
        if self.exchange is not None:
            self.exchange.done()

    def _use(self, stage: int, m: int | None, outcome: Outcome | None) -> None:
        """A gradient whose turn has come, in the communication thread; None: of a micro-batch that others have."""
        with self._thread():
            if m is None or outcome is None:
                self.learner.skip(stage)
            else:
                with self._streams.of(m):
                    self.learner.learn(stage, m, outcome)

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

    def state_dict(self) -> dict[int, Any]:
        """Of all replicas, by number. A collective call."""
        self.pause()
        return dict(gather((self.network.replica, {"fed": self._fed, "turns": dict(self.learner.turns)})))

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """What is in flight, and what failed, is given up."""
        if self.crew is not None:
            self.crew.end()
            self.crew = self._crew(self.crew.threads[1])
        for stage in self.stages.values():
            stage.give_up()
        if self.exchange is not None:
            self.exchange.forget()
        self._streams = Streams(self.device, self.workers)
        self._losses.clear()
        self._failure = None
        own = state[self.network.replica]
        self._fed = own["fed"]
        self.learner.start(own["turns"])
        if self.crew is not None:
            self.crew.fed = self.crew.done = self._fed
        self.end = None

    def rests(self, state: dict[int, Any]) -> bool:
        return not any(turns for own in state.values() for turns in own["turns"].values())

    def sent_up(self) -> int:
        return 0  # there is no other rank

    def told(self) -> str:
        return "" if self.exchange is None else " ".join(f"{name}: {n}" for name, n in self.exchange.report().items())

    def report(self) -> dict[str, Any]:
        """A collective call of replicas."""
        if self.crew is None:
            return {}
        forward, backward = self.crew.threads
        overlaps = {} if self.pace.threads.locked else {"overlapping_updates": list(self.learner.overlaps.values())}
        found = {"threads": {"forward": forward, "backward": backward, "queue": self.crew.queue, **self.crew.report(),
                             **overlaps}}
        if self.exchange is not None:
            counts = {"micro_batches": self.through, **self.exchange.report()}
            found["exchange"] = {"kind": self.pace.exchange.kind, "every": self.pace.exchange.every, "replicas": gather(counts)}
        return found
