"""What each method means: slow, plain loops, from the papers' definitions.

Ticks: forward of micro-batch m on stage s in tick m + a s, backward in tick m + a(J-1) + b(J-1-s), an update after every k-th
backward of a stage. Nothing here is the engine's: a stage's earlier weights are deep copies, a graph with current weights is
autograd's own graph whose weights are overwritten behind its back, and couplings are undone by the paper's formulas.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ds_decoupled.nn import ReversibleCoupling


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _leaves(x: Any) -> Any:
    made = tuple(t.detach().clone().requires_grad_(t.is_floating_point()) for t in _tuple(x))
    return made if isinstance(x, tuple) else made[0]


def _run(stage: nn.Sequential, x: Any) -> Any:
    """Forward; in-place layers may not touch the leaves."""
    return stage(tuple(t.clone() for t in x) if isinstance(x, tuple) else x.clone())


def _back(y: Any, dy: tuple[Tensor | None, ...]) -> None:
    pairs = [(t, d) for t, d in zip(_tuple(y), dy) if d is not None and t.requires_grad]
    torch.autograd.backward([t for t, _ in pairs], [d for _, d in pairs])


class Oracle:
    """One method on one list of stages, trained in one process by the definition."""

    def __init__(self, stages: list[nn.Sequential], *, recover: str, weights: str, flush: bool, hops: tuple[int, int], k: int,
                 lr: float = 0.1, momentum: float = 0.9, clip: float = 0.0, decay: float = 1.0) -> None:
        self.stages, self.recover, self.weights, self.k, self.clip = stages, recover, weights, k, clip
        self.hops, self.flush = hops, flush
        self.optimizers = [torch.optim.SGD(s.parameters(), lr=lr, momentum=momentum) for s in stages]
        self.schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, decay) for o in self.optimizers]
        self.losses: list[float] = []
        self.grads: dict[tuple[int, int], list[Tensor]] = {}  # gradients of every micro-batch, by (micro-batch, stage)
        self.reconstructed: dict[tuple[int, int], Any] = {}
        self.inputs: dict[tuple[int, int], Any] = {}
        self._records: dict[tuple[int, int], Any] = {}
        self._previous: dict[int, list[Tensor]] = {}  # each stage's weights before its last update
        self._done = [0] * len(stages)

    # one stage, one micro-batch

    def _forward(self, s: int, m: int, x: Any) -> Any:
        live = self.stages[s]
        self.inputs[m, s] = x
        if self.recover == "graph":
            leaves = _leaves(x)
            module = live
            if self.weights == "stashed":  # the version of this micro-batch, kept whole
                module = copy.deepcopy(live)
            y = _run(module, leaves)
            if self.weights == "stashed":
                for b, new in zip(live.buffers(), module.buffers()):
                    b.copy_(new)
            self._records[m, s] = (leaves, y, module)
        else:
            module = self._as_in_forward(s)  # batch-norm statistics of this pass are thrown away with the copy
            with torch.no_grad():
                y = _run(module, x)
            self._records[m, s] = (x, module if self.weights == "stashed" else None)
        return tuple(t.detach() for t in y) if isinstance(y, tuple) else y.detach()

    def _as_in_forward(self, s: int) -> nn.Sequential:
        """A copy with the weights of a forward pass: as they are, or where they would be after the updates that pass before its
        backward pass, if each were the last one again."""
        module = copy.deepcopy(self.stages[s])
        if self.weights == "predicted" and s in self._previous:
            lead = sum(self.hops) * (len(self.stages) - 1 - s) / self.k
            for p, before in zip(module.parameters(), self._previous[s]):
                p.data += lead * (p.data - before)
        return module

    def _backward(self, s: int, m: int, y: Any, dy: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        """Gradients go to the live stage's ``.grad``; returns the input (rebuilt where the method does) and its gradients."""
        live = self.stages[s]
        if self.recover == "graph":
            leaves, outputs, module = self._records.pop((m, s))
            module.zero_grad() if module is not live else None
            _back(outputs, dy)
            if module is not live:
                self._add(live, [p.grad for p in module.parameters()])
            return leaves, tuple(t.grad for t in _tuple(leaves))
        kept, old = self._records.pop((m, s))
        if self.recover == "input":
            return self._rerun(live, old, kept, dy)
        # reconstruct: walk the layers from the top; the input of a run of other layers was kept
        inputs = self._inputs_of_other_runs(s, m)
        module = live if old is None else old
        if old is not None:  # old weights, but the running statistics are the stage's
            old.zero_grad()
            for b, now in zip(old.buffers(), live.buffers()):
                b.copy_(now)
        layers = list(module)
        index = len(layers)
        while index > 0:
            layer = layers[index - 1]
            if isinstance(layer, ReversibleCoupling):
                y1, y2, *rest = y  # what travels beside the streams goes through unchanged, and its gradients add up
                x1, *beside = _leaves((y2, *rest))
                f = layer.f(x1, *beside)
                f.backward(dy[0])
                y = x1.detach(), y1 - f.detach(), *rest
                dy = (dy[1] + x1.grad, dy[0], *(d if r.grad is None else r.grad if d is None else d + r.grad
                                                for r, d in zip(beside, dy[2:])))
                index -= 1
            else:
                start = index - 1
                while start > 0 and not isinstance(layers[start - 1], ReversibleCoupling):
                    start -= 1
                y, dy = self._rerun(nn.Sequential(*layers[start:index]), None, inputs[start], dy)
                index = start
        if old is not None:
            self._add(live, [p.grad for p in old.parameters()])
            for b, new in zip(live.buffers(), old.buffers()):
                b.copy_(new)
        self.reconstructed[m, s] = y
        return y, dy

    def _inputs_of_other_runs(self, s: int, m: int) -> dict[int, Any]:
        return self._run_inputs.pop((m, s))

    def _rerun(self, live: nn.Sequential, old: nn.Module | None, x: Any, dy: tuple[Tensor, ...]) -> Any:
        leaves = _leaves(x)
        module = old if old is not None else live
        if old is not None:  # old weights, but the running statistics are the stage's
            for b, now in zip(old.buffers(), live.buffers()):
                b.copy_(now)
        y = _run(module, leaves)
        _back(y, dy)
        if old is not None:
            self._add(live, [p.grad for p in old.parameters()])
            for b, new in zip(live.buffers(), old.buffers()):
                b.copy_(new)
        return x, tuple(t.grad for t in _tuple(leaves))

    @staticmethod
    def _add(live: nn.Module, grads: list[Tensor]) -> None:
        for p, g in zip(live.parameters(), grads):
            p.grad = g.clone() if p.grad is None else p.grad + g

    def _note_run_inputs(self, s: int, m: int, x: Any) -> None:
        """The inputs of runs of layers that cannot be undone, as the forward pass met them."""
        if self.recover != "reconstruct":
            return
        noted, copied = {}, self._as_in_forward(s)
        previous_reversible = True
        with torch.no_grad():
            for i, layer in enumerate(copied):
                reversible = isinstance(layer, ReversibleCoupling)
                if not reversible and previous_reversible:
                    noted[i] = x
                previous_reversible = reversible
                x = layer(x)
        self._run_inputs[m, s] = noted

    def _update_if_due(self, s: int) -> None:
        self._done[s] += 1
        if self._done[s] % self.k:
            return
        if self.clip:
            nn.utils.clip_grad_norm_(self.stages[s].parameters(), self.clip)
        # A graph in flight holds the parameters themselves; this write is hidden from it, so it finds the new values.
        parameters = list(self.stages[s].parameters())
        self._previous[s] = [p.detach().clone() for p in parameters]
        with torch.autograd._unsafe_preserve_version_counter(tuple(parameters)):
            self.optimizers[s].step()
        self.optimizers[s].zero_grad()
        self.schedulers[s].step()

    # the whole pipeline

    def train(self, data: list[tuple[Tensor, Tensor]]) -> None:
        if self.flush:
            for start in range(0, len(data), self.k):
                self._train(data[start:start + self.k], start)
        else:
            self._train(data, 0)

    def _train(self, data: list[tuple[Tensor, Tensor]], first: int) -> None:
        J, (a, b) = len(self.stages), self.hops
        self._run_inputs: dict[tuple[int, int], Any] = {}
        outputs: dict[tuple[int, int], Any] = {}
        grads: dict[tuple[int, int], Any] = {}
        last = J - 1
        for tick in range(len(data) + (a + b) * last + 1):
            for s in range(J):  # all forwards, in stage order
                m = tick - a * s
                if 0 <= m < len(data) and s < last:
                    x = data[m][0] if s == 0 else outputs.pop((m, s - 1))
                    self._note_run_inputs(s, m, x)
                    outputs[m, s] = self._forward(s, m, x)
            for s in range(J):  # all backwards
                m = tick - a * last - b * (last - s)
                if not 0 <= m < len(data):
                    continue
                before = [None if p.grad is None else p.grad.clone() for p in self.stages[s].parameters()]
                if s == last:
                    x = data[m][0] if s == 0 else outputs.pop((m, s - 1))
                    leaves = _leaves(x)
                    logits, labels = _run(self.stages[s], leaves), data[m][1]
                    loss = cross_entropy(logits.flatten(0, -2), labels.flatten())
                    (loss / self.k).backward()
                    self.losses.append(loss.item())
                    x, dx = x, tuple(t.grad for t in _tuple(leaves))
                else:
                    y, dy = grads.pop((m, s))
                    x, dx = self._backward(s, m, y, dy)
                self.grads[first + m, s] = [p.grad - g if g is not None else p.grad.clone()
                                            for p, g in zip(self.stages[s].parameters(), before)]
                grads[m, s - 1] = (x, dx)
                self._update_if_due(s)
