"""The arithmetic of PETRA and of backpropagation with nothing around it: what an engine's overhead is measured against.

Both loops share no code with the engine beyond the model's layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from ds_decoupled.nn import ReversibleCoupling

Batches = Iterator[tuple[Tensor, Tensor]]
Loss = Callable[[Any, Any], Tensor]


def backprop_loop(layers: list[nn.Module], batches: Batches, k: int, sgd: Callable[..., SGD], loss: Loss) -> Callable[[], None]:
    """One call: k micro-batches forward and back through all layers, one step."""
    return _whole_updates(nn.Sequential(*layers), batches, k, sgd, loss)


def data_parallel_loop(layers: list[nn.Module], batches: Batches, k: int, sgd: Callable[..., SGD],
                       loss: Loss) -> Callable[[], None]:
    """As :func:`backprop_loop`, in each of several processes: torch's DDP averages gradients, in each backward pass."""
    return _whole_updates(DistributedDataParallel(nn.Sequential(*layers)), batches, k, sgd, loss)


def _whole_updates(model: nn.Module, batches: Batches, k: int, sgd: Callable[..., SGD], loss: Loss) -> Callable[[], None]:
    optimizer = sgd(model.parameters())

    def call() -> None:
        for _ in range(k):
            inputs, labels = next(batches)
            (loss(model(inputs), labels) / k).backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def petra_loop(layers: list[nn.Module], batches: Batches, k: int, sgd: Callable[..., SGD], loss: Loss) -> Callable[[], None]:
    """One call: k ticks of PETRA with hops (1, 1), every layer a stage with its own optimizer."""
    loop = _PetraLoop(layers, batches, k, sgd, loss)

    def call() -> None:
        for _ in range(k):
            loop.tick()

    return call


def _leaf(x: Any) -> Any:
    return tuple(t.detach().requires_grad_() for t in x) if isinstance(x, tuple) else x.detach().requires_grad_()


def _grad(x: Any) -> Any:
    return tuple(t.grad for t in x) if isinstance(x, tuple) else x.grad


class _PetraLoop:
    def __init__(self, layers: list[nn.Module], batches: Batches, k: int, sgd: Callable[..., SGD], loss: Loss) -> None:
        self.layers, self.batches, self.k, self.loss = layers, batches, k, loss
        self.optimizers = [sgd(layer.parameters()) for layer in layers]
        self.norms = [[m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)] for layer in layers]
        self.up: list[deque[Any]] = [deque() for _ in layers]  # (input, labels) into each stage
        self.down: list[deque[Any]] = [deque() for _ in layers]  # (output, its gradient) into each stage
        self.kept: list[deque[Any]] = [deque() for _ in layers]  # inputs, at the stages that cannot be undone
        self.backwards = [0 for _ in layers]

    def tick(self) -> None:
        """Every stage goes forward with one micro-batch and back with another."""
        last = len(self.layers) - 1
        self.up[0].append(next(self.batches))
        top = self.up[last].popleft() if self.up[last] else None
        for s in range(last - 1, -1, -1):
            if self.up[s]:
                x, labels = self.up[s].popleft()
                self.up[s + 1].append((self._forward(s, x), labels))
        for s in range(last):
            if self.down[s]:
                self._backward(s, *self.down[s].popleft())
        if top is not None:
            self._loss(*top)

    def _forward(self, s: int, x: Any) -> Any:
        layer = self.layers[s]
        if not isinstance(layer, ReversibleCoupling):
            self.kept[s].append(x)
        for norm in self.norms[s]:
            norm.track_running_stats = False
        with torch.no_grad():
            y = layer(x)
        for norm in self.norms[s]:
            norm.track_running_stats = True
        return y

    def _loss(self, x: Any, labels: Tensor) -> None:
        x = _leaf(x)
        (self.loss(self.layers[-1](x), labels) / self.k).backward()
        self.down[-2].append((x, _grad(x)))
        self._step_if_due(len(self.layers) - 1)

    def _backward(self, s: int, y: Any, dy: Any) -> None:
        layer = self.layers[s]
        if isinstance(layer, ReversibleCoupling):
            x1 = y[1].detach().requires_grad_()
            residual = layer.f(x1)
            x: Any = (x1.detach(), y[0].detach() - residual.detach())
            residual.backward(dy[0])
            assert x1.grad is not None
            dx: Any = (x1.grad.add_(dy[1]), dy[0])
        else:
            x = self.kept[s].popleft() if s == 0 else _leaf(self.kept[s].popleft())
            torch.autograd.backward(layer(x), dy)
            dx = None if s == 0 else _grad(x)
        if s > 0:
            self.down[s - 1].append((x, dx))
        self._step_if_due(s)

    def _step_if_due(self, s: int) -> None:
        self.backwards[s] += 1
        if self.backwards[s] % self.k == 0:
            self.optimizers[s].step()
            self.optimizers[s].zero_grad()
