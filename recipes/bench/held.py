"""What a rank holds while our engine trains: activations that its stages keep, messages between them, old weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.runner import Runner
from ds_decoupled.schedules import Action
from ds_decoupled.stages import Outcome
from ds_decoupled.watchers import Watcher


def distinct_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Held(Watcher):
    """Looks after every forward and backward pass at what the rank holds.

    Attributes:
        peaks: in bytes: ``kept`` is what stages keep for their backward passes, ``with_messages`` that and what waits between
            stages, ``stashed`` old versions of weights.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.peaks = {"kept": 0, "with_messages": 0, "stashed": 0}

    def acted(self, action: Action, outcome: Outcome) -> None:
        if not (action.kind.begins or action.kind.ends):
            return
        stages = self.engine.stages.values()
        kept = [t for stage in stages for t in stage.kept()]
        waiting = [t for message in self.engine.network.queued() for t in tree_leaves(message.parts) if isinstance(t, Tensor)]
        stashed = [t for stage in stages for values in stage.weights.stash.values() for t in values]
        for name, tensors in (("kept", kept), ("with_messages", kept + waiting), ("stashed", stashed)):
            self.peaks[name] = max(self.peaks[name], distinct_bytes(iter(tensors)))


def watch_activations(runner: Runner, calls: int) -> dict[str, int]:
    """Run so many calls of ours under a :class:`Held`; its peaks."""
    held = Held(runner.engine)
    runner.engine.watch(held)
    for _ in range(calls):
        runner.call()
    runner.engine.watchers.remove(held)
    return held.peaks
