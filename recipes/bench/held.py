"""What a rank holds while our engine trains: activations that its stages keep, messages between them, old weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.runner import Runner
from ds_decoupled.schedules import Action
from ds_decoupled.stages import Outcome
from ds_decoupled.stages.segment import Segment, SegmentObserver
from ds_decoupled.watchers import Watcher


def distinct_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Held(Watcher, SegmentObserver):
    """Looks at what the rank holds, as soon as a stage has gone forward (a stage with a loss of its own keeps nothing longer),
    and when it has gone back.

    Attributes:
        peaks: in bytes: ``kept`` is what stages keep for their backward passes, ``with_messages`` that and what waits between
            stages, ``stashed`` old versions of weights.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.peaks = {"kept": 0, "with_messages": 0, "stashed": 0}

    def went_forward(self, segment: Segment, micro_batch: int, inputs: Any) -> None:
        self._look()

    def acted(self, action: Action, outcome: Outcome) -> None:
        if action.kind.begins or action.kind.ends:
            self._look()

    def _look(self) -> None:
        stages = self.engine.stages.values()
        kept = [t for stage in stages for t in stage.kept()]
        waiting = [t for message in self.engine.network.queued() for t in tree_leaves(message.opened().parts)
                   if isinstance(t, Tensor)]
        stashed = [t for stage in stages for values in stage.weights.stash.values() for t in values]
        for name, tensors in (("kept", kept), ("with_messages", kept + waiting), ("stashed", stashed)):
            self.peaks[name] = max(self.peaks[name], distinct_bytes(iter(tensors)))


def watch_activations(runner: Runner, calls: int) -> dict[str, int]:
    """Run so many calls of ours under a :class:`Held`; its peaks."""
    held = Held(runner.engine)
    stages = runner.engine.stages.values()
    runner.engine.watch(held)
    for stage in stages:
        stage.observers.append(held)
    for _ in range(calls):
        runner.call()
    runner.engine.watchers.remove(held)
    for stage in stages:
        stage.observers.remove(held)
    return held.peaks
