"""Marks that tell the partitioner where a model's blocks begin."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")

_MARK = "starts_block"


def mark_block(layer: T) -> T:
    """Mark ``layer`` (a ``LayerSpec``, an ``nn.Module`` or a function) as the first layer of a block.

    With ``"stages": "blocks"`` every block becomes one stage. Returns the layer itself.
    """
    setattr(layer, _MARK, True)
    return layer


def block_starts(layers: list[Any]) -> list[int]:
    """Indices of the layers that were marked with :func:`mark_block`; the first layer always counts if any does."""
    marked = [i for i, layer in enumerate(layers) if getattr(layer, _MARK, False)]
    if marked and marked[0] != 0:
        marked.insert(0, 0)
    return marked
