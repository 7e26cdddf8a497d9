"""What layers take and return, as in DeepSpeed: a tensor, or a tuple of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Tensor | tuple[Tensor, ...]
#: Gradients of a tuple: None where a tensor has none (integers, or outputs that nobody used).
Gradients = tuple[Tensor | None, ...]


def as_tuple(tensors: Tensors) -> tuple[Tensor, ...]:
    """A tuple, whatever came."""
    if isinstance(tensors, Tensor):
        return (tensors,)
    if isinstance(tensors, (tuple, list)) and all(isinstance(t, Tensor) for t in tensors):
        return tuple(tensors)
    raise TypeError("a layer must return a tensor or a tuple of tensors, as in DeepSpeed; this one gave "
                    f"{describe_value(tensors)}")


def like(structure: Tensors, tensors: tuple[Any, ...]) -> Any:
    """``tensors`` in the form of ``structure``: alone where that is a single tensor."""
    return tensors[0] if isinstance(structure, Tensor) else tensors


def map_tensors(fn: Callable[[Tensor], Tensor], tensors: Tensors) -> Tensors:
    """``fn`` of each tensor, in the same form."""
    return fn(tensors) if isinstance(tensors, Tensor) else tuple(fn(t) for t in as_tuple(tensors))


Form = tuple[tuple[tuple[int, ...], bool], ...]
"""Of each tensor its shape without the batch, and whether it is floating point."""


def form_of(tensors: Tensors) -> Form:
    """What is the same for two batches that a layer takes alike."""
    return tuple((tuple(t.shape[1:]), t.is_floating_point()) for t in as_tuple(tensors))


def detach(tensors: Tensors) -> Tensors:
    """The same values without a graph."""
    return map_tensors(Tensor.detach, tensors)


def leaves(tensors: Tensors, need_grad: bool) -> Tensors:
    """The same values as the leaves of a new graph: floating-point (and complex) ones collect gradients if ``need_grad``."""
    return map_tensors(lambda t: t.detach().requires_grad_(need_grad and (t.is_floating_point() or t.is_complex())), tensors)


def to_device(tensors: Tensors, device: torch.device) -> Tensors:
    """The same values on ``device``."""
    return map_tensors(lambda t: t.to(device, non_blocking=True), tensors)


def on_device(value: Any, device: torch.device) -> Any:
    """``value`` (a message's part, or a tuple of parts) with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return tuple(on_device(v, device) for v in value) if isinstance(value, tuple) else value


def nbytes(tensors: Tensors) -> int:
    """Bytes of the values."""
    return sum(t.numel() * t.element_size() for t in as_tuple(tensors))


def channel_dim(shape: Sequence[int]) -> int | None:
    """Where a tensor of ``shape`` has its channels: dimension 1 of (N, C, H, W), the last one of (N, features) and
    (N, T, features); None for any other."""
    return {2: 1, 3: 2, 4: 1}.get(len(shape))


def describe_value(value: Any) -> str:
    """What ``value`` is, for an error."""
    if isinstance(value, (tuple, list)):
        kinds = ", ".join(sorted({type(v).__name__ for v in value}))
        return f"a {type(value).__name__} of {kinds}" if value else f"an empty {type(value).__name__}"
    return "None" if value is None else f"a {type(value).__name__}"
