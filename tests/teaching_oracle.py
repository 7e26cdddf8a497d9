"""What it means to teach heads before stages learn: a slow, plain loop.

Every update takes k micro-batches through the whole model in evaluation mode. Each head's loss is the cross-entropy of the
labels, or the Kullback-Leibler divergence from what the model itself says; its gradients are averaged over the k. Adam steps by
a rate that rises linearly, then falls by a cosine to 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def rate(update: int, updates: int, peak: float, warmup: float) -> float:
    """Of an update, from 0."""
    rising = round(updates * warmup)
    if update < rising:
        return peak * ((update + 1) / rising)
    return peak * (0.5 * (1 + math.cos(math.pi * (update - rising) / max(1, updates - rising))))


def teach(stages: list[nn.Sequential], heads: list[nn.Module | None], data: list[tuple[Tensor, Tensor]], *, k: int,
          updates: int, lr: float, warmup: float, target: str) -> list[list[float]]:
    """Teach ``heads`` with the first micro-batches of ``data``; the losses of each, by update."""
    taught = [head for head in heads if head is not None]
    learn = [[p for p in head.parameters() if p.requires_grad] for head in taught]
    adams = [torch.optim.Adam(parameters, lr=lr) for parameters in learn]
    losses: list[list[float]] = [[] for _ in taught]
    for stage in stages:
        stage.eval()
    for update in range(updates):
        told: list[list[Tensor]] = [[] for _ in taught]
        for ids, labels in data[update * k:(update + 1) * k]:
            x: Any = ids
            given = []
            with torch.no_grad():
                for stage in stages:
                    x = stage(x)
                    given.append(x)
                whole = x.float().log_softmax(-1)
            for head, parameters, y, said in zip(taught, learn, [y for y, h in zip(given, heads) if h is not None], told):
                logits = head(y)
                if target == "labels":
                    loss = cross_entropy(logits.flatten(0, -2), labels.flatten())
                else:
                    own = logits.float().log_softmax(-1)
                    loss = (whole.exp() * (whole - own)).sum(-1).mean()
                for p, g in zip(parameters, torch.autograd.grad(loss / k, parameters)):
                    p.grad = g if p.grad is None else p.grad + g
                said.append(loss.detach())
        for adam, said, of in zip(adams, told, losses):
            adam.param_groups[0]["lr"] = rate(update, updates, lr, warmup)
            adam.step()
            adam.zero_grad()
            of.append(torch.stack(said).mean().item())
    for stage in stages:
        stage.train()
    return losses
