"""The terms of layer-parallel training (arXiv 2112.05387) between a stage's output and the next stage's generated input.

With K stages, ``lambda_k`` the input of stage k, ``z_k = F_k(lambda_k)`` and multipliers ``kappa``, training minimizes

    phi(z_{K-1}, y) + sum_k  beta/2 |lambda_{k+1} - z_k|^2 + <kappa_{k+1}, lambda_{k+1} - z_k>

Of one such pair, tensor by tensor, with N elements (the batch's among them), v the mean square of z at the first micro-batch
and p what reached ``lambda_{k+1}`` of the stage above (divided by k micro-batches an update, as all of it)::

    c_fit = beta_fit / (N v)      c_pull = beta_pull / (N v)
    gradient of z_k     =  -c_fit (target - z_k) - kappa
    lambda^ (is to be)  =  lambda - eta / c_pull * (r p + c_pull (lambda - z_k) + kappa)
    kappa (next)        =  kappa + c_pull (lambda^ - z_k)

The target is ``lambda``, and in later sweeps of the penalty method ``lambda^``. The signs are ours (the paper's text leaves
them open); the scale, which makes betas mean the same at every layer, is too. With ``eta = 1`` the next kappa is ``-r p``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Below it a mean square counts as this.
TINY = 1e-30


@dataclass(frozen=True)
class Coefficients:
    """Of all pairs of a run.

    Attributes:
        fit, pull: the betas.
        eta: length of the step.
        trust: the most that a sample may move, in root mean squares of z; None for any.
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
    def of(coefficients: Coefficients, z: Tensor, mean_square: Tensor, scale: float) -> Terms:
        """For the output ``z``, ``(N, ...)``.

        Args:
            mean_square: v.
            scale: of the loss, times what the betas have grown by.
        """
        bound = None
        if coefficients.trust is not None:
            bound = coefficients.trust * torch.sqrt(mean_square * (z.numel() / z.shape[0]))
        return Terms(scale * coefficients.fit / z.numel() / mean_square, scale * coefficients.pull / z.numel() / mean_square,
                     coefficients.eta, bound)

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
