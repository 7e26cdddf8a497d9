"""What a rank holds while our engine trains: activations that its stages keep, messages between them, old weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.runner import Runner


def distinct_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def watch_activations(runner: Runner, calls: int) -> dict[str, int]:
    """Run so many calls of ours and look after every forward and backward at what the rank holds (peaks, in bytes).

    ``kept`` is what stages keep for their backward passes, ``with_messages`` that and what waits between stages,
    ``stashed`` old versions of weights.
    """
    engine = runner.engine
    peaks = {"kept": 0, "with_messages": 0, "stashed": 0}
    originals = {s: (stage.forward, stage.backward) for s, stage in engine.stages.items()}

    def look() -> None:
        kept = [t for stage in engine.stages.values() for t in stage.kept()]
        queues = (*engine.network.activations.values(), *engine.network.gradients.values())
        waiting = [t for link in queues for message in link.queue for t in tree_leaves(message.parts) if isinstance(t, Tensor)]
        stashed = [t for stage in engine.stages.values() for values in stage.weights.stash.values() for t in values]
        for name, tensors in (("kept", kept), ("with_messages", kept + waiting), ("stashed", stashed)):
            peaks[name] = max(peaks[name], distinct_bytes(iter(tensors)))

    def and_look(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            result = function(*args)
            look()
            return result
        return watched

    for s, stage in engine.stages.items():
        stage.forward, stage.backward = (and_look(function) for function in originals[s])
    for _ in range(calls):
        runner.call()
    for s, stage in engine.stages.items():
        stage.forward, stage.backward = originals[s]
    return peaks
