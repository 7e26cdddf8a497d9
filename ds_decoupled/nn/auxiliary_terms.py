"""The terms of layer-parallel training (arXiv 2112.05387) between a stage's output and the next stage's generated input.

With K stages, ``lambda_k`` the input of stage k, ``z_k = F_k(lambda_k)`` and multipliers ``kappa``, training minimizes

    phi(z_{K-1}, y) + sum_k  beta/2 |lambda_{k+1} - z_k|^2 + <kappa_{k+1}, lambda_{k+1} - z_k>

Of one such pair, tensor by tensor, with N elements (the batch's among them), v the spread of z (:class:`Spread`) and p what
reached ``lambda_{k+1}`` of the stage above (divided by k micro-batches an update, as all of it)::

    c_fit = beta_fit / (N v)      c_pull = beta_pull / (N v)
    gradient of z_k     =  -c_fit (target - z_k) - kappa
    lambda^ (is to be)  =  lambda - eta / c_pull * (r p + c_pull (lambda - z_k) + kappa)
    kappa (next)        =  kappa + c_pull (lambda^ - z_k)

The target is ``lambda``, and in later sweeps of the penalty method ``lambda^``. The signs are ours (the paper's text leaves
them open); the scale, which makes betas mean the same at every layer, is too. With ``eta = 1`` the next kappa is ``-r p``.

v follows z. Were it the first micro-batch's, layer and AuxNet would come together by shrinking what both give, which costs
nothing: on CIFAR-10 the variance of z fell to a tenth, and the mismatch stayed above the spread of what was left
(docs/auxnet.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.tensors import channel_dim

#: Below it a mean square counts as this.
TINY = 1e-30

#: The part of the way that a spread moves in an update.
RATE = 0.01


@dataclass(frozen=True)
class Coefficients:
    """Of all pairs of a run.

    Attributes:
        fit, pull: the betas.
        eta: length of the step.
        trust: the most that a sample may move, in standard deviations of z; None for any.
        growth: ``(factor, updates)`` of both betas; None where they stay.
    """

    fit: float
    pull: float
    eta: float = 1.0
    trust: float | None = None
    growth: tuple[float, int] | None = None

    def grown(self, updates: int) -> float:
        """What both betas are multiplied by after so many updates.

        >>> Coefficients(1, 1, growth=(100.0, 10)).grown(5)
        10.0
        """
        if self.growth is None:
            return 1.0
        factor, last = self.growth
        return float(factor ** min(1.0, updates / last))


@dataclass(frozen=True)
class Terms:
    """Of one pair in one micro-batch.

    Attributes:
        c_fit, c_pull: one number each.
        eta: length of the step.
        bound: the most that a sample may move, as a norm; None for any.
    """

    c_fit: Tensor
    c_pull: Tensor
    eta: float
    bound: Tensor | None

    @staticmethod
    def of(coefficients: Coefficients, z: Tensor, v: Tensor, scale: float) -> Terms:
        """For the output ``z``, ``(N, ...)``.

        Args:
            v: its spread.
            scale: of the loss, times what the betas have grown by.
        """
        bound = None
        if coefficients.trust is not None:
            bound = coefficients.trust * torch.sqrt(v * (z.numel() / z.shape[0]))
        c_fit, c_pull = (scale * beta / z.numel() / v for beta in (coefficients.fit, coefficients.pull))
        return Terms(c_fit, c_pull, coefficients.eta, bound)

    def gradient(self, z: Tensor, target: Tensor, kappa: Tensor | None) -> Tensor:
        """Of the stage's output."""
        grad = (z - target) * self.c_fit
        return grad if kappa is None else grad - kappa

    def to_be(self, generated: Tensor, z: Tensor, p: Tensor, kappa: Tensor | None) -> Tensor:
        """What the generated input should have been."""
        slope = p + self.c_pull * (generated - z)
        step = (slope if kappa is None else slope + kappa) * (self.eta / self.c_pull)
        if self.bound is not None:
            length = step.flatten(1).norm(dim=1).clamp_min(TINY)
            step = step * (self.bound / length).clamp_max(1.0).view(-1, *(1,) * (step.dim() - 1))
        return generated - step

    def next_kappa(self, kappa: Tensor, to_be: Tensor, z: Tensor) -> Tensor:
        """The multiplier of the next sweep."""
        return kappa + self.c_pull * (to_be - z)


def mean_square(value: Tensor) -> Tensor:
    """One number, not 0."""
    return value.float().square().mean().clamp_min(TINY)


def variance(z: Tensor) -> Tensor:
    """Of ``z`` ``(N, ...)`` about each channel's mean over samples and places; at least a hundredth of the mean square, so
    that a batch of one sample, or an output that has become constant, gives a number that can be divided by."""
    z = z.float()
    channel = channel_dim(z.shape) or 1
    centred = z - z.mean(dim=[d for d in range(z.dim()) if d != channel], keepdim=True)
    return torch.maximum(centred.square().mean(), 0.01 * z.square().mean()).clamp_min(TINY)


class Spread:
    """v of one tensor: a moving mean of its :func:`variance`, which moves once an update.

    Attributes:
        value: v; None before the first micro-batch.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._seen: list[Tensor] = []

    def see(self, z: Tensor, average: Callable[[Tensor], None] | None) -> Tensor:
        """A micro-batch's output. Returns v.

        Args:
            average: over data-parallel replicas, in place; None for one replica.
        """
        now = variance(z)
        self._seen.append(now)
        if self.value is None:
            # At once, since this micro-batch needs it; replicas are all at their first now.
            self.value = now.clone()
            if average is not None:
                average(self.value)
        return self.value

    @property
    def now(self) -> Tensor:
        """The last micro-batch's own."""
        return self._seen[-1]

    def move(self, average: Callable[[Tensor], None] | None) -> None:
        """An update is over: a hundredth of the way to what its micro-batches had."""
        if self._seen and self.value is not None:
            mean = torch.stack(self._seen).mean()
            if average is not None:
                average(mean)
            self.value = torch.lerp(self.value, mean, RATE)
            self._seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """v, and what has been seen since it moved."""
        return {"value": self.value, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any], device: str | torch.device) -> None:
        """The inverse of :meth:`state_dict`."""
        self.value = None if state["value"] is None else state["value"].to(device)
        self._seen = [value.to(device) for value in state["seen"]]
