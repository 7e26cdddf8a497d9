"""Counting the bytes of tensors that live while a method trains, the same way for every engine.

Counted from the storages themselves, not from the process: whatever torch makes while :class:`LiveBytes` is on counts from the
operation that made it until it is freed, be it held by an autograd graph, a stage, a checkpoint, a message or a running pass.
Parameters, their gradients and optimizer state do not count; what an operator allocates and frees within itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.held import distinct_bytes
from bench.models import Model
from bench.plan import Configuration
from bench.runner import build
from ds_decoupled.compat import around_instructions
from ds_decoupled.schedules import Action
from ds_decoupled.watchers import Watcher
from run.worlds import Parent


class LiveBytes(TorchDispatchMode):
    """Within, bytes of storages that were made within and still live.

    Args:
        parameters: whose gradients do not count.

    Attributes:
        live: bytes at this moment.
        peak: the most since :meth:`restart`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._leave_gradient_out)

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
        if made:
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for storage in made:
                self._note(storage, given)
        return result

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in given or key in self._sizes or not nbytes:
            return
        self._sizes[key] = nbytes
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def _leave_gradient_out(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._forget(parameter.grad.untyped_storage()._cdata)


@dataclass(frozen=True)
class Job:
    """One thing to count: a configuration on a model, ``block`` overriding settings of its method's ``decoupled`` block."""

    configuration: Configuration
    model: Model
    bounds: list[int]
    block: dict[str, Any]


def count_all(parent: Parent, jobs: Sequence[Job], calls: int) -> None:
    """One after the other, an answer each."""
    for job in jobs:
        parent.tell(count_live(job, calls))


def count_live(job: Job, calls: int) -> dict[str, int]:
    """Train until the pipeline is full, then count over ``calls`` calls, in bytes:

    - ``held``: the most that lived between two instructions, that is while no pass was running: what waits for a backward
      pass, and messages on their way;
    - ``peak``: the most that lived at any moment;
    - ``kept``: of ``held``, the most that stages kept for their backward passes (ours alone).
    """
    runner = build(job.configuration, job.model, job.bounds, block=job.block, optimizer={"lr": 1e-5},
                   data=_copies(job.model.batches()))
    engine = runner.engine
    counter = LiveBytes(engine.module.parameters())
    most = {"held": 0, "kept": 0}

    def look() -> None:
        most["held"] = max(most["held"], counter.live)
        if runner.ours:
            kept = (t for stage in engine.stages.values() for t in stage.kept())
            most["kept"] = max(most["kept"], distinct_bytes(kept))

    if runner.ours:
        engine.watch(_Looks(look))
    else:
        around_instructions(engine, lambda _, function: _and_then(function, look))
    with counter:
        for _ in range(runner.warm_up):
            runner.call()
        counter.restart()
        most.update(held=0, kept=0)
        for _ in range(calls):
            runner.call()
    return {**most, "peak": counter.peak}


def _copies(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """New tensors for every micro-batch, as a data loader makes them: so they count where they are kept."""
    for inputs, labels in batches:
        yield inputs.clone(), labels.clone()


class _Looks(Watcher):
    """Calls a function after every action."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def after(self, action: Action) -> None:
        self.look()


def _and_then(function: Callable[..., Any], look: Callable[[], None]) -> Callable[..., Any]:
    """DeepSpeed's own engine knows no watchers: ``look`` is called after each of its instructions."""
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        look()
        return result

    return watched
