"""Batch-norm statistics move once per micro-batch, in the pass that the gradients come from.

Where the backward pass runs the forward again, the first forward must normalise by the batch and leave the running
statistics alone; a normalisation layer does just that while ``track_running_stats`` is off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def tracking_modules(layers: Iterable[Any]) -> list[_NormBase]:
    """The modules in ``layers`` that keep running statistics (batch norm, instance norm, and what derives from them)."""
    found: list[_NormBase] = []
    for layer in layers:
        if isinstance(layer, nn.Module):
            found += [m for m in layer.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    return found


@contextmanager
def frozen_statistics(modules: list[_NormBase]) -> Iterator[None]:
    """Within, ``modules`` normalise by the batch and do not move their running statistics.

    Modules in evaluation mode (frozen by the user) go on using the statistics they have.
    """
    training = [module for module in modules if module.training]
    for module in training:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in training:
            module.track_running_stats = True


@contextmanager
def restored_statistics(modules: list[_NormBase]) -> Iterator[None]:
    """Within, running statistics move as ever; behind, they are what they were."""
    before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
