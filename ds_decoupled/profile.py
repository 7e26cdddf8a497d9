"""Measured time per layer: the partition method ``profile``, which DeepSpeed announces and does not have."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from torch import nn

from ds_decoupled.stages.layers import backward, leaves
from ds_decoupled.tensors import Tensors, as_tuple, detach, to_device

#: Timed runs of a layer, after one that warms up.
_REPEATS = 5


def layer_times(layers: Sequence[Any], sample_input: Tensors, recover: str = "graph") -> list[float]:
    """Seconds that each layer takes for ``sample_input`` to pass forward and back, the same on every rank.

    Layers are built one at a time on the first rank, timed alone there (medians), and the times sent to all. Optimizer
    steps are left out.

    Args:
        layers: ``LayerSpec``s, modules or functions.
        sample_input: one micro-batch of the first one's inputs.
        recover: the axis of this name: unless it is ``graph``, a layer's forward runs once more in the backward pass
            (but not the last layer's, whose stage goes forward and back at once).
    """
    times: list[list[float] | None] = [None]
    if dist.get_rank() == 0:
        times = [_measure(layers, sample_input, forwards=1 if recover == "graph" else 2)]
    dist.broadcast_object_list(times, src=0)
    assert times[0] is not None
    return times[0]


def _measure(layers: Sequence[Any], sample_input: Tensors, forwards: int) -> list[float]:
    device = torch.device(get_accelerator().current_device_name())
    x = to_device(detach(sample_input), device)
    seconds = []
    for index, layer in enumerate(layers):
        first, last = index == 0, index == len(layers) - 1
        function: Callable[[Any], Any] = layer.build() if isinstance(layer, LayerSpec) else layer
        if isinstance(function, nn.Module):
            function.to(device)
        samples = []
        for _ in range(_REPEATS + 1):
            get_accelerator().synchronize()
            start = time.perf_counter()
            outputs = function(leaves(x, not first))
            get_accelerator().synchronize()
            middle = time.perf_counter()
            backward(outputs, tuple(torch.ones_like(y) for y in as_tuple(outputs)))
            get_accelerator().synchronize()
            samples.append((1 if last else forwards) * (middle - start) + time.perf_counter() - middle)
        if isinstance(function, nn.Module):
            function.zero_grad(set_to_none=True)
        seconds.append(statistics.median(samples[1:]))
        x = detach(outputs)
    return seconds
