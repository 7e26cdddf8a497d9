"""Where micro-batches come from: the data iterator of the first stage's ranks, in every form that DeepSpeed takes.

A micro-batch is ``(inputs, labels)``; both are a tensor or a tuple of tensors, and labels may be None. Where the last layer
gives the loss itself (the pipeline module has no ``loss_fn``), inputs alone will do. What another form would be taken for in
DeepSpeed (a third part is ignored, the first sample of a bare tensor is the batch) is refused here by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.collectives import error_of_group
from ds_decoupled.errors import BatchError
from ds_decoupled.tensors import Tensors, describe_value

MicroBatch = tuple[Tensors, Tensors | None]


@dataclass(frozen=True)
class Feed:
    """Takes micro-batches from iterators.

    Attributes:
        device: where they go.
        needs_labels: whether there is a ``loss_fn`` to give labels to.
    """

    device: torch.device
    needs_labels: bool

    def next(self, iterator: Iterator[Any] | None, batch_fn: Callable[[Any], Any] | None, call: str) -> MicroBatch:
        """The next micro-batch, in tensors of its own: an iterator may fill the same ones again.

        Args:
            iterator: the user's.
            batch_fn: what :meth:`set_batch_fn` was given.
            call: the engine's method, for errors.

        Raises:
            BatchError: for what is no iterator, or a micro-batch of another form.
            StopIteration: at the end of the data.
        """
        if iterator is None:
            raise BatchError(f"{call}() has no data: the ranks of the first stage need an iterator of (inputs, labels)")
        if not hasattr(type(iterator), "__next__"):
            raise BatchError(f"{call}() needs an iterator, and a {type(iterator).__name__} is none: make one with iter(...) "
                             "once, before the first call, or take deepspeed.utils.RepeatingLoader, which starts again at "
                             "the end")
        batch = next(iterator)
        inputs, labels = self._parts(batch_fn(batch) if batch_fn else batch)
        return self._own(inputs, "inputs"), None if labels is None else self._own(labels, "labels")

    def fetch(self, iterator: Iterator[Any] | None, batch_fn: Callable[[Any], Any] | None, count: int,
              replicas: Any) -> list[MicroBatch] | Exception:
        """The micro-batches of a call of ``train_batch``; or why there are none, on all replicas alike.

        Args:
            iterator, batch_fn: as in :meth:`next`.
            count: k.
            replicas: the data-parallel group, None for one replica. A collective call of it.
        """
        fetched: list[MicroBatch] = []
        error: Exception | None = None
        try:
            for _ in range(count):
                fetched.append(self.next(iterator, batch_fn, "train_batch"))
        except Exception as failure:
            error = failure
        return error_of_group(error, replicas, self.device) or fetched

    def _parts(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, (tuple, list)):
            if len(batch) == 2:
                return batch[0], batch[1]
            if len(batch) == 1 and not self.needs_labels:
                return batch[0], None
            raise BatchError(f"a micro-batch must be (inputs, labels), and this one is a {type(batch).__name__} of "
                             f"{len(batch)} parts; several inputs or labels go into a tuple: ((a, b), labels)"
                             + (", and where there are no labels, None takes their place" if len(batch) == 1 else ""))
        if isinstance(batch, Tensor) and not self.needs_labels:
            return batch, None
        if isinstance(batch, Mapping):
            raise BatchError(f"a micro-batch must be (inputs, labels), and this one is a {type(batch).__name__} with the keys "
                             f"{', '.join(map(repr, batch))}; engine.set_batch_fn(fn) takes a function that picks them")
        raise BatchError(f"a micro-batch must be (inputs, labels), and this one is {describe_value(batch)}"
                         + ("; where there are no labels, (inputs, None)" if isinstance(batch, Tensor) else ""))

    def _own(self, part: Any, name: str) -> Tensors:
        if isinstance(part, Tensor):
            return self._copy(part)
        if isinstance(part, (tuple, list)) and part and all(isinstance(t, Tensor) for t in part):
            return tuple(self._copy(t) for t in part)
        raise BatchError(f"the {name} of a micro-batch must be a tensor or a tuple of tensors, and these are "
                         f"{describe_value(part)}; torch.as_tensor makes tensors of numbers and arrays")

    def _copy(self, tensor: Tensor) -> Tensor:
        # A batch on its way may be read many ticks later, when the user's iterator has long filled the same tensor again.
        given = tensor.detach()
        moved = given.to(self.device, non_blocking=True)
        return given.clone() if moved is given else moved
