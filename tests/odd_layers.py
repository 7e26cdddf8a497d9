"""Layers that a stranger's model may have: a context beside the streams, states of their own, weights drawn on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from nets import CLASSES, NETS
from torch import Tensor, nn

from ds_decoupled.nn import ReversibleCoupling, mark_block

WIDTH = 6


class SplitWithContext(nn.Module):
    """Two streams, and what a trained layer made of the input beside them: floating point, whole numbers, a second context."""

    def __init__(self) -> None:
        super().__init__()
        self.streams, self.context, self.second = nn.Linear(128, 2 * WIDTH), nn.Linear(128, WIDTH), nn.Linear(128, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.flatten(1)
        x1, x2 = (t.contiguous() for t in self.streams(x).chunk(2, 1))
        return x1, x2, torch.tanh(self.context(x)), torch.arange(WIDTH), torch.sigmoid(self.second(x))


class ContextResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor, order: Tensor, second: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * context[:, order.flip(0)] + second


class Rotate(nn.Module):
    """Undone by an inverse of its own; its angle comes from the context."""

    def forward(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x1, x2, context, order, second = parts
        return x1 * torch.exp(second), x2 * torch.exp(-second), context, order, second

    def inverse(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x1, x2, context, order, second = parts
        return x1 * torch.exp(-second), x2 * torch.exp(second), context, order, second


class ClassifyWithContext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, parts: tuple[Tensor, ...]) -> Tensor:
        return self.linear(torch.cat(parts[:2], 1)) + parts[4].mean()


class ContextCoupling(ReversibleCoupling):
    def __init__(self) -> None:
        super().__init__(ContextResidual())


def context_net(rotate: bool = False) -> list[Any]:
    """A context is made at the bottom, used by couplings (and by a layer with an inverse), and comes to the top too."""
    made = [LayerSpec(SplitWithContext), LayerSpec(ContextCoupling), LayerSpec(ContextCoupling),
            *([LayerSpec(Rotate)] if rotate else []), LayerSpec(ContextCoupling), LayerSpec(ClassifyWithContext)]
    return [mark_block(layer) for layer in made]


class Stateful(nn.Module):
    """Four states: written in place, replaced, the vectors of a spectral norm, and a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("large", torch.zeros(1 << 15))
        self.register_buffer("mask", torch.ones(1 << 15))  # does not move
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.large[int(self.count) % 8] += 1
        return torch.tanh(self.norm(self.linear(x))) * self.mask[0]


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.state = nn.Linear(128, 2 * WIDTH), Stateful()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x1, x2 = (t.contiguous() for t in self.linear(x.flatten(1)).chunk(2, 1))
        return self.state(x1), x2


class Classes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, parts: tuple[Tensor, ...]) -> Tensor:
        return self.linear(torch.cat(parts, 1))


class StatefulCoupling(ReversibleCoupling):
    def __init__(self) -> None:
        super().__init__(Stateful())


class StatefulScale(nn.Module):
    """Undone by an inverse of its own, which runs through a state too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def _scale(self) -> Tensor:
        self.runs += 1
        return torch.tensor(2.0)

    def forward(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return parts[0] * self._scale(), parts[1]

    def inverse(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return parts[0] / self._scale(), parts[1]


def stateful_net(scale: bool = False) -> list[Any]:
    made = [LayerSpec(Flat), LayerSpec(StatefulCoupling), *([LayerSpec(StatefulScale)] if scale else []),
            LayerSpec(StatefulCoupling), LayerSpec(Classes)]
    return [mark_block(layer) for layer in made]


class Counted(nn.Module):
    """Counts how often it is built, and draws its weights on the CPU whatever the device."""

    built = 0

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        Counted.built += 1
        self.weight = nn.Parameter(torch.randn(outputs, inputs, device="cpu") / inputs)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(x.flatten(1) @ self.weight.T))


def counted_net() -> list[Any]:
    widths = (128, 16, 16, 16, CLASSES)
    return [LayerSpec(Counted, inputs, outputs) for inputs, outputs in zip(widths, widths[1:])]


def linear_head(shape: torch.Size, outputs: int) -> nn.Module:
    """A head by its name, ``odd_layers:linear_head``."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(outputs))


NETS.update(context=context_net, stateful=stateful_net, counted=counted_net)
