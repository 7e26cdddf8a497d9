"""What stage-local losses mean: a slow, plain loop, from the papers' definitions.

Stage s learns from the losses of the heads of s, ..., s+n-1 (or of the farthest alone), each through the stages between. The
loss of stage l reaches stage s in tick m + a l + b (l - s); the stage's gradient is complete with the last of them. Every
gradient is taken by ``torch.autograd.grad`` from graphs that are kept whole; an update writes into the parameters behind
their back, so that what comes later finds the new values.

The transport penalty belongs to a stage's own loss: the sum over its layers of the mean square of what each adds. A stage that
rebuilds has ten times the mean squared error of its input (the first one: of its first layer's output) as its loss.

A lesson: in the first updates heads step by a rate of their own, which rises linearly and falls by a cosine to 0, and a stage
that would learn from any head gets no gradient.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from oracle import _leaves, _tuple
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from ds_decoupled.nn import ReversibleCoupling


class LocalOracle:
    """One method on one list of stages, trained in one process by the definition."""

    def __init__(self, stages: list[nn.Sequential], heads: list[nn.Module | None], *, window: int, farthest: bool,
                 hops: tuple[int, int], k: int, lr: float = 0.1, momentum: float = 0.9, refresh: int = 0,
                 transport: float = 0.0, rebuild: bool = False, head_lr: float = 1.0,
                 lesson: dict[str, Any] | None = None) -> None:
        self.stages, self.heads, self.window, self.farthest, self.hops, self.k = stages, heads, window, farthest, hops, k
        self.refresh, self.transport, self.rebuild = refresh, transport, rebuild
        self.parameters = [[*s.parameters(), *self._head_parameters(h)] for s, h in zip(stages, heads)]
        self.lr, self.head_lr, self.lesson = lr, head_lr, lesson
        self.optimizers = [torch.optim.SGD([{"params": list(s.parameters())}, {"params": self._head_parameters(h)}],
                                           lr=lr, momentum=momentum) for s, h in zip(stages, heads)]
        self.taught: list[list[float]] = [[] for _ in stages]
        self.losses: dict[tuple[int, int], float] = {}
        self.grads: dict[tuple[int, int], list[Tensor]] = {}
        self._done = [0] * len(stages)

    @staticmethod
    def _head_parameters(head: nn.Module | None) -> list[nn.Parameter]:
        return [] if head is None else [p for p in head.parameters() if p.requires_grad]

    def _refresh(self, tick: int) -> None:
        """Every so many updates the readout that ends each shared head becomes the last stage's."""
        if self.refresh and tick % (self.k * self.refresh) == 0:
            for head in self.heads:
                if head is not None:
                    head.head[-1].layer.load_state_dict(self.stages[-1][-1].state_dict())

    def losses_of(self, s: int) -> list[int]:
        """The stages whose losses stage s learns from."""
        last = min(s + self.window, len(self.stages)) - 1
        return [last] if self.farthest else list(range(s, last + 1))

    def train(self, data: list[tuple[Tensor, Tensor]]) -> None:
        J, (a, b) = len(self.stages), self.hops
        wanted = {loss for s in range(J) for loss in self.losses_of(s)}
        made: dict[tuple[int, int], Any] = {}  # (m, s): the stage's leaves and output
        at_output: dict[tuple[int, int, int], tuple[Tensor, ...]] = {}  # (m, loss, s): that loss's gradient at s's output
        head_grads: dict[tuple[int, int], list[Tensor]] = {}
        for tick in range(len(data) + (a + b) * J + 1):
            if tick < len(data):
                self._refresh(tick)
            for s in range(J):
                m = tick - a * s
                if not 0 <= m < len(data):
                    continue
                x = data[m][0] if s == 0 else tuple(t.detach() for t in _tuple(made[m, s - 1][1]))
                if s > 0 and not isinstance(made[m, s - 1][1], tuple):
                    x = x[0]
                leaves = _leaves(x)
                y, penalties, entry = self._forward(self.stages[s], leaves)
                made[m, s] = (leaves, y, penalties)
                if s in wanted:
                    target = data[m][1]
                    if self.rebuild and self.heads[s] is not None:
                        target = sum(t.detach() for t in _tuple(entry if s == 0 else leaves))
                    self._own_loss(m, s, y, target, at_output, head_grads)
                    self._pass_down(m, s, s, made, at_output)
                    if s == self.losses_of(s)[-1]:
                        self._learn(m, s, made, at_output, head_grads)
            for s in range(J):
                for distance in range(1, self.window):
                    loss = s + distance
                    m = tick - a * loss - b * distance
                    if loss >= J or not 0 <= m < len(data) or loss not in wanted:
                        continue
                    self._pass_down(m, loss, s, made, at_output)
                    if loss == self.losses_of(s)[-1]:
                        self._learn(m, s, made, at_output, head_grads)

    def _is_lesson(self, update: int) -> bool:
        return self.lesson is not None and update < self.lesson["updates"]

    def _set_rates(self, s: int, update: int) -> None:
        stage, head = self.optimizers[s].param_groups
        stage["lr"], head["lr"] = self.lr, self.lr * self.head_lr
        if self._is_lesson(update):
            head["lr"] = rate(update, **self.lesson)
            if self.heads[s] is not None:
                self.taught[s].append(sum(self.losses[update * self.k + i, s] for i in range(self.k)) / self.k)

    def _forward(self, stage: nn.Sequential, leaves: Any) -> tuple[Any, list[Tensor], Any]:
        """What the stage gives, the penalties of its layers, and what its first layer gives."""
        x = tuple(t.clone() for t in leaves) if isinstance(leaves, tuple) else leaves.clone()
        penalties, entry = [], None
        for layer in stage:
            before, x = _tuple(x), layer(x)
            entry = x if entry is None else entry
            after = _tuple(x)
            if isinstance(layer, ReversibleCoupling):
                before, after = (before[1],), (after[0],)
            if self.transport and all(a.shape == b.shape and a.is_floating_point() for a, b in zip(before, after)):
                penalties += [((b - a) ** 2).mean() * self.transport for a, b in zip(before, after)]
        return x, penalties, entry

    def _roots(self, m: int, s: int, loss: int, made: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Where the loss of stage ``loss`` starts in stage s beside its output: its penalties, if it is the stage's own."""
        penalties = made[m, s][2] if loss == s else []
        return penalties, [torch.tensor(1 / self.k) for _ in penalties]

    def _own_loss(self, m: int, s: int, y: Any, labels: Tensor, at_output: Any, head_grads: Any) -> None:
        head = self.heads[s]
        if head is None:  # the last stage: its output is what the loss takes
            loss = cross_entropy(y.flatten(0, -2), labels.flatten())
            at_output[m, s, s] = torch.autograd.grad(loss / self.k, [y], retain_graph=True)
            head_grads[m, s] = []
        else:
            ends = _leaves(y)
            if self.rebuild:
                loss = 10 * mse_loss(head(ends), labels)
            else:
                loss = cross_entropy(head(ends).flatten(0, -2), labels.flatten())
            found = torch.autograd.grad(loss / self.k, [*_tuple(ends), *self._head_parameters(head)])
            at_output[m, s, s], head_grads[m, s] = found[:len(_tuple(ends))], list(found[len(_tuple(ends)):])
        self.losses[m, s] = loss.item()

    def _pass_down(self, m: int, loss: int, s: int, made: Any, at_output: Any) -> None:
        """A loss has reached stage s: from its output to its input, which is the output of the stage below."""
        if s > 0 and loss - (s - 1) < self.window:
            leaves, y, _ = made[m, s]
            penalties, ones = self._roots(m, s, loss, made)
            at_output[m, loss, s - 1] = torch.autograd.grad([*_tuple(y), *penalties], list(_tuple(leaves)),
                                                            [*at_output[m, loss, s], *ones], retain_graph=True)

    def _learn(self, m: int, s: int, made: Any, at_output: Any, head_grads: Any) -> None:
        _, y, _ = made[m, s]
        penalties, ones = self._roots(m, s, s if s in self.losses_of(s) else -1, made)
        dy = [sum(parts) for parts in zip(*(at_output[m, loss, s] for loss in self.losses_of(s)))]
        parameters = list(self.stages[s].parameters())
        found = torch.autograd.grad([*_tuple(y), *penalties], parameters, [*dy, *ones], retain_graph=True)
        head = [] if self.heads[s] is None else head_grads[m, s]
        pairs = list(zip(self.parameters[s], [*found, *head]))
        if self._is_lesson(m // self.k) and any(self.heads[loss] is not None for loss in self.losses_of(s)):
            pairs = pairs[len(found):]
        for p, g in pairs:
            p.grad = g.clone() if p.grad is None else p.grad + g
        self.grads[m, s] = list(found)
        self._done[s] += 1
        if self._done[s] % self.k == 0:
            self._set_rates(s, m // self.k)
            with torch.autograd._unsafe_preserve_version_counter(tuple(self.parameters[s])):
                self.optimizers[s].step()
            self.optimizers[s].zero_grad()


def rate(update: int, updates: int, lr: float, warmup: float) -> float:
    """Of an update of the lesson, from 0."""
    rising = round(updates * warmup)
    if update < rising:
        return lr * ((update + 1) / rising)
    return lr * (0.5 * (1 + math.cos(math.pi * (update - rising) / max(1, updates - rising))))


def copies(heads: dict[int, nn.Module], count: int) -> list[nn.Module | None]:
    """One per stage."""
    return [copy.deepcopy(heads[s]) if s in heads else None for s in range(count)]
