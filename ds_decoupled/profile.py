"""Measured time per layer: the partition method ``profile``, which DeepSpeed announces and does not have."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from torch import nn

from ds_decoupled.stages.layers import backward, leaves
from ds_decoupled.tensors import Tensors, as_tuple, detach, to_device

#: Timed runs of a layer, after one that warms up.
_REPEATS = 5


class LayerTime(NamedTuple):
    """Seconds of one layer."""

    forward: float
    backward: float

    def cost(self, reruns_forward: bool) -> float:
        """Seconds per micro-batch: the forward once more where the backward pass runs it again."""
        return self.forward * (2 if reruns_forward else 1) + self.backward


def layer_times(layers: Sequence[Any], sample_input: Tensors) -> list[LayerTime]:
    """Seconds that each layer takes for ``sample_input`` to pass forward and back, the same on every rank.

    Layers are built one at a time on the first rank, timed alone there (medians), and the times sent to all. Optimizer
    steps are left out.

    Args:
        layers: ``LayerSpec``s, modules or functions.
        sample_input: one micro-batch of the first one's inputs.
    """
    times: list[list[LayerTime] | None] = [None]
    if dist.get_rank() == 0:
        times = [_measure(layers, sample_input)]
    dist.broadcast_object_list(times, src=0)
    assert times[0] is not None
    return times[0]


def _measure(layers: Sequence[Any], sample_input: Tensors) -> list[LayerTime]:
    device = torch.device(get_accelerator().current_device_name())
    x = to_device(detach(sample_input), device)
    seconds = []
    for index, layer in enumerate(layers):
        function: Callable[[Any], Any] = layer.build() if isinstance(layer, LayerSpec) else layer
        if isinstance(function, nn.Module):
            function.to(device)
        samples = []
        for _ in range(_REPEATS + 1):
            get_accelerator().synchronize()
            start = time.perf_counter()
            outputs = function(leaves(x, index > 0))
            get_accelerator().synchronize()
            middle = time.perf_counter()
            backward(outputs, tuple(torch.ones_like(y) for y in as_tuple(outputs)))
            get_accelerator().synchronize()
            samples.append((middle - start, time.perf_counter() - middle))
        if isinstance(function, nn.Module):
            function.zero_grad(set_to_none=True)
        seconds.append(LayerTime(*(statistics.median(column) for column in zip(*samples[1:]))))
        x = detach(outputs)
    return seconds
