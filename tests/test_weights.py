"""What an autograd graph keeps of the weights, and when it is let go."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from ds_decoupled.stages.weights import SavedActivation, Weights


def test_a_graph_that_nobody_walks_is_let_go() -> None:
    """An operation that saves its own result (rsqrt) must not hold itself where no backward pass comes: in front of an input
    whose gradient nobody wants, and under a loss that is dropped."""
    weight = nn.Parameter(torch.randn(4))
    weights = Weights([weight], stashed=False)
    saved: list[weakref.ref[Any]] = []
    x = torch.randn(3, 4, requires_grad=True)

    with weights.by_reference(saved):
        y = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    assert sum(isinstance(ref(), SavedActivation) for ref in saved) >= 3
    torch.autograd.backward([y], [torch.ones_like(y)], inputs=[weight])
    torch.testing.assert_close(weight.grad, (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).detach().sum(0))
    del y
    assert not any(ref() for ref in saved)

    with weights.by_reference(saved):
        dropped = x.exp() * weight
    del dropped
    assert not any(ref() for ref in saved)
