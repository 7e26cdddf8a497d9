"""The backward pass in two halves: first the input's gradient, which somebody waits for, then the weights' gradients.

Zero bubble's split (arXiv 2401.10241) at the layers that hold nearly all of the work: convolutions and linear maps. Their
backward computes the input's gradient alone and notes what the weight's needs; :meth:`DeferredWeightGradients.run` computes
the rest once the gradient is on its way. Other layers' parameters (norms, embeddings) get their gradients at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Job = Callable[[], None]


class DeferredWeightGradients:
    """Makes the convolutions and linear maps in ``layers`` put off their weights' gradients.

    Args:
        layers: a stage's layers; their ``forward`` is replaced where the weight is trainable and the type is exactly one
            of torch's own.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self._jobs: list[Job] = []
        self._active = True
        for layer in layers:
            if isinstance(layer, nn.Module):
                for module in layer.modules():
                    # Not subclasses: their forward may do more than the function below. Not other padding modes: they pad
                    # before they convolve, and that padding would need its own backward.
                    if type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.weight.requires_grad and (
                            getattr(module, "padding_mode", "zeros") == "zeros"):
                        self._defer(module)

    def _defer(self, module: Any) -> None:
        function = _DeferredConv if isinstance(module, _ConvNd) else _DeferredLinear

        def forward(x: Tensor) -> Tensor:
            # A forward pass that nobody goes back through (evaluation, the first of a recomputed stage) puts nothing off.
            if not (self._active and torch.is_grad_enabled()):
                return type(module).forward(module, x)
            return function.apply(x, module.weight, module.bias, module, self._jobs)

        module.forward = forward

    def run(self) -> None:
        """Compute and accumulate what was put off."""
        for job in self._jobs:
            job()
        self._jobs.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, graphs are built as ever."""
        self._active = False
        try:
            yield
        finally:
            self._active = True


def _accumulate(parameter: nn.Parameter | None, grad: Tensor | None) -> None:
    if parameter is None or grad is None or not parameter.requires_grad:
        return
    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: Any, jobs: list[Job]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.jobs = module, jobs
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        module = ctx.module

        def job() -> None:
            rows = dy.reshape(-1, dy.shape[-1])
            _accumulate(module.weight, rows.T @ x.reshape(-1, x.shape[-1]))
            _accumulate(module.bias, rows.sum(0))

        ctx.jobs.append(job)
        return dy @ weight if ctx.needs_input_grad[0] else None, None, None, None, None


class _DeferredConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: Any, jobs: list[Job]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.jobs = module, jobs
        return module._conv_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        module = ctx.module
        # "same" and "valid" are words, where convolution_backward wants numbers.
        padding = module._reversed_padding_repeated_twice[::-2] if isinstance(module.padding, str) else module.padding
        has_bias = module.bias is not None

        def gradients(wanted: tuple[bool, bool, bool]) -> Any:
            return torch.ops.aten.convolution_backward(
                dy, x, weight, [weight.shape[0]] if has_bias else None, module.stride, list(padding), module.dilation, False,
                [0] * len(module.stride), module.groups, wanted)

        def job() -> None:
            _, dw, db = gradients((False, True, has_bias))
            _accumulate(module.weight, dw)
            _accumulate(module.bias, db if has_bias else None)

        ctx.jobs.append(job)
        return gradients((True, False, False))[0] if ctx.needs_input_grad[0] else None, None, None, None, None
