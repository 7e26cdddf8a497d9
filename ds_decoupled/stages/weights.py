"""Which weights a pass multiplies by: the current ones, in a backward pass those of its forward pass, or in a forward pass
those that its backward pass is expected to find.

An autograd graph that outlives an update would either refuse (the version counter moved) or mix versions silently
(ZeRO-1 and bf16 write through ``.data``). So the graph keeps no weight at all, only a note of which weight it wants and
of which version; the weight is looked up when the backward pass asks for it.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class SavedActivation:
    """A tensor that the graph holds for itself. An object of its own, so that a checkpoint can find it while it lives.

    Without its own graph: an operation that saves its result would otherwise hold itself, and live for ever where no backward
    pass runs through it, as in front of an input whose gradient nobody wants.
    """

    __slots__ = ("tensor", "__weakref__")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


class WeightReference:
    """A view of a parameter, or of its cast to another type, that the graph will ask for: parameter, geometry relative to it,
    version, and type."""

    __slots__ = ("index", "size", "stride", "offset", "version", "dtype", "__weakref__")

    def __init__(self, index: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int, version: int,
                 dtype: torch.dtype | None = None) -> None:
        self.index, self.size, self.stride, self.offset, self.version = index, size, stride, offset, version
        self.dtype = dtype

    def as_dict(self) -> dict[str, Any]:
        """The arguments that make it again."""
        return {name: getattr(self, name) for name in self.__slots__[:-1]}


Saved = SavedActivation | WeightReference


class Weights:
    """The weights of one stage, by version.

    Args:
        parameters: the stage's parameters.
        stashed: whether a backward pass gets the version of its forward pass. A version is copied when an update is
            about to overwrite it and a micro-batch in flight still wants it, not before; it is dropped with the last
            such micro-batch.
        predicted: whether a forward pass is to run on what the weights are expected to be when its gradient comes back
            (SpecTrain, arXiv 1809.02839, with the last update in the place of the momentum); costs one copy of the weights.

    Attributes:
        lead: updates between a forward pass and its backward pass.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], stashed: bool, predicted: bool = False) -> None:
        self.parameters = list(parameters)
        self.stashed, self.predicted = stashed, predicted
        self.lead = 0.0
        self.version = 0
        self._before: list[Tensor] | None = None
        self.stash: dict[int, list[Tensor]] = {}
        self._in_flight: dict[int, int] = {}
        self._ranges: dict[int, tuple[list[int], list[tuple[int, int]]]] | None = None

    # -- versions -----------------------------------------------------------------------------------------------

    def forward_done(self, micro_batch: int) -> None:
        """``micro_batch`` has passed forward under the current version."""
        if self.stashed:
            self._in_flight[micro_batch] = self.version

    def backward_done(self, micro_batch: int) -> None:
        """Nobody needs the version of ``micro_batch`` for its sake any more."""
        if self.stashed:
            version = self._in_flight.pop(micro_batch)
            if version not in self._in_flight.values():
                self.stash.pop(version, None)

    def before_update(self) -> None:
        """Copy the current version if a micro-batch in flight or a prediction wants it; then a new version begins."""
        if self.predicted and self.lead:
            self._before = [p.detach().clone() for p in self.parameters]
        if not self.stashed:
            return
        if Counter(self._in_flight.values())[self.version]:
            self.stash[self.version] = [p.detach().clone() for p in self.parameters]
        self.version += 1

    @contextmanager
    def of(self, micro_batch: int) -> Iterator[None]:
        """Within, the parameters hold the values that ``micro_batch`` saw in its forward pass."""
        values = self.stash.get(self._in_flight[micro_batch]) if self.stashed else None
        with self._holding(values):
            yield

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Within, the parameters hold their predicted values: as if the last update came ``lead`` times more."""
        values = None
        if self._before is not None and self.lead:
            values = [p.data + self.lead * (p.data - before) for p, before in zip(self.parameters, self._before)]
        with self._holding(values):
            yield

    @contextmanager
    def _holding(self, values: list[Tensor] | None) -> Iterator[None]:
        if values is None:
            yield
            return
        current = [p.data for p in self.parameters]
        try:
            for parameter, value in zip(self.parameters, values):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(self.parameters, current):
                parameter.data = value

    # -- references from an autograd graph ------------------------------------------------------------------------

    def forget_storage(self) -> None:
        """Parameters may have moved (an optimizer flattens them, a checkpoint replaces them): look again."""
        self._ranges = None

    def _find(self, tensor: Tensor) -> tuple[int, int] | None:
        """The parameter that ``tensor`` is a view of, and its byte distance from that parameter's start."""
        if self._ranges is None:
            by_storage: dict[int, list[tuple[int, int, int]]] = {}
            for index, parameter in enumerate(self.parameters):
                if parameter.numel():
                    start = parameter.data_ptr()
                    by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append(
                        (start, start + parameter.numel() * parameter.element_size(), index))
            self._ranges = {storage: ([r[0] for r in sorted(ranges)], [(r[1], r[2]) for r in sorted(ranges)])
                            for storage, ranges in by_storage.items()}
        entry = self._ranges.get(tensor.untyped_storage().data_ptr())
        if entry is None or not tensor.numel():
            return None
        # Several parameters may share one storage (bf16 and ZeRO flatten them), so the right one is looked up by its address.
        starts, ends = entry
        start = tensor.data_ptr()
        position = bisect_right(starts, start) - 1
        if position < 0 or start >= ends[position][0]:
            return None
        return ends[position][1], start - starts[position]

    def pack(self, tensor: Tensor) -> Saved:
        """What the graph keeps of ``tensor``: a note where it is a weight, the tensor itself elsewhere."""
        try:
            found = self._find(tensor)
        except (RuntimeError, NotImplementedError):  # tensors without a storage: sparse, wrapped, mkldnn
            found = None
        if found is None:
            return self._cast_weight(tensor) or SavedActivation(tensor)
        index, distance = found
        # A view as another type (complex, bits) cannot be made again from a shape and a stride.
        if tensor.dtype != self.parameters[index].dtype:
            return SavedActivation(tensor)
        return WeightReference(index, tuple(tensor.shape), tensor.stride(), distance // tensor.element_size(), self.version)

    def _cast_weight(self, tensor: Tensor) -> WeightReference | None:
        """A note where ``tensor`` is a parameter's cast to another type, as autocast makes them: known by its history, because
        its storage is its own."""
        # A linear map saves the transpose of the cast weight, which is a view of the cast.
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        cast = base.grad_fn
        if cast is None or cast.name() != "ToCopyBackward0":
            return None
        source = getattr(cast.next_functions[0][0], "variable", None)
        index = next((i for i, p in enumerate(self.parameters) if p is source), None)
        if index is None or base.device != self.parameters[index].device or base.stride() != self.parameters[index].stride():
            return None
        offset = int(tensor.storage_offset()) - int(base.storage_offset())
        return WeightReference(index, tuple(tensor.shape), tensor.stride(), offset, self.version, base.dtype)

    def unpack(self, saved: Saved) -> Tensor:
        """The tensor that the graph asks for, with the weights as they are now, or as they were if stashed."""
        if isinstance(saved, SavedActivation):
            return saved.tensor
        source = self.parameters[saved.index].detach()
        if self.stashed and saved.version in self.stash:
            source = self.stash[saved.version][saved.index]
        if saved.dtype is not None:
            source = source.to(saved.dtype)
        return source.as_strided(saved.size, saved.stride, source.storage_offset() + saved.offset)

    @contextmanager
    def by_reference(self, saved: list[weakref.ref[Saved]]) -> Iterator[None]:
        """Graphs built within hold references instead of weights; what they hold is listed in ``saved``, weakly."""
        def pack(tensor: Tensor) -> Saved:
            kept = self.pack(tensor)
            saved.append(weakref.ref(kept))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, self.unpack):
            yield

    @contextmanager
    def replay(self, contents: list[Any], saved: list[weakref.ref[Saved]]) -> Iterator[None]:
        """Like :meth:`by_reference`, but graphs built within hold ``contents``, in the order in which they were listed,
        and not what the running computation saves: so a graph comes back from a checkpoint whatever the weights are
        by now."""
        # The same layers on the same shapes save the same number of tensors in the same order.
        remaining = iter(contents)

        def pack(tensor: Tensor) -> Saved:
            content = next(remaining)
            kept = WeightReference(**content) if isinstance(content, dict) else SavedActivation(content.to(tensor.device))
            saved.append(weakref.ref(kept))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, self.unpack):
            yield

    # -- checkpoint -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, "in_flight": dict(self._in_flight), "stash": self.stash, "before": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forget_storage()
        self.version = state["version"]
        self._in_flight = dict(state["in_flight"])
        self.stash = {v: [value.to(p.device) for value, p in zip(values, self.parameters)]
                      for v, values in state["stash"].items()}
        before = state["before"]
        self._before = None if before is None else [value.to(p.device) for value, p in zip(before, self.parameters)]
