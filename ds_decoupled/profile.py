"""Measured time per layer: the partition method ``profile``, which DeepSpeed announces and does not have."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec
from torch import nn

from ds_decoupled.collectives import together
from ds_decoupled.stages.layers import backward
from ds_decoupled.tensors import Form, Tensors, as_tuple, detach, form_of, leaves, to_device

#: Timed runs of a layer, after one that warms up.
_REPEATS = 5


#: Builds the head of a stage from its number, what the stage gives, how many outputs the last layer has, and the forms of what
#: all layers give.
HeadMaker = Callable[[int, Tensors, int, Sequence[Form]], nn.Module]


class LayerTime(NamedTuple):
    """Seconds of one layer, and of the head of a stage that ends with it."""

    forward: float
    backward: float
    head: float = 0.0

    def cost(self, reruns_forward: bool) -> float:
        """Seconds per micro-batch: the forward once more where the backward pass runs it again."""
        return self.forward * (2 if reruns_forward else 1) + self.backward + self.head


def layer_times(layers: Sequence[Any], sample_input: Tensors, make_head: HeadMaker | None = None,
                ends: Sequence[int] = ()) -> list[LayerTime]:
    """Seconds that each layer takes for ``sample_input`` to pass forward and back, the same on every rank.

    Layers are built one at a time on the first rank, timed alone there (medians), and the times sent to all. Optimizer
    steps are left out.

    Args:
        layers: ``LayerSpec``s, modules or functions.
        sample_input: one micro-batch of the first one's inputs.
        make_head: of stages that learn from losses of their own.
        ends: where their stages end: one past the last layer of each, in order, without the last stage.
    """
    measure = partial(_measure, layers, sample_input, make_head, ends)
    times: list[list[LayerTime] | None] = [together(measure if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(times, src=0)
    assert times[0] is not None
    return times[0]


def _measure(layers: Sequence[Any], sample_input: Tensors, make_head: HeadMaker | None,
             ends: Sequence[int]) -> list[LayerTime]:
    device = torch.device(get_accelerator().current_device_name())
    x = to_device(detach(sample_input), device)
    seconds, given, forms = [], {}, []
    for index, layer in enumerate(layers):
        function: Callable[[Any], Any] = layer.build() if isinstance(layer, LayerSpec) else layer
        time_of, x = _time(function, x, index > 0, device)
        seconds.append(LayerTime(*time_of))
        forms.append(form_of(x))
        if index + 1 in ends:
            given[index] = x
    if make_head is not None:
        outputs = as_tuple(x)[0].shape[-1]
        for stage, (index, y) in enumerate(given.items()):
            time_of, _ = _time(make_head(stage, y, outputs, forms), y, True, device)
            seconds[index] = seconds[index]._replace(head=sum(time_of))
    return seconds


def _time(function: Callable[[Any], Any], x: Tensors, to_input: bool,
          device: torch.device) -> tuple[tuple[float, float], Tensors]:
    """Seconds of a forward and a backward pass, and what the forward pass gave."""
    if isinstance(function, nn.Module):
        function.to(device)
    samples = []
    for _ in range(_REPEATS + 1):
        get_accelerator().synchronize()
        start = time.perf_counter()
        outputs = function(leaves(x, to_input))
        get_accelerator().synchronize()
        middle = time.perf_counter()
        backward(outputs, tuple(torch.ones_like(y) for y in as_tuple(outputs)))
        get_accelerator().synchronize()
        samples.append((middle - start, time.perf_counter() - middle))
    if isinstance(function, nn.Module):
        function.zero_grad(set_to_none=True)
    forward_seconds, backward_seconds = (statistics.median(column) for column in zip(*samples[1:]))
    return (forward_seconds, backward_seconds), detach(outputs)
