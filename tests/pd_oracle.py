"""What PD-ASGD means: a slow, plain loop over a clock of whole numbers, from the definition (arXiv 2410.05985).

Forward threads take one micro-batch after the other through all layers, on whatever the weights are, and never wait for an
update. What is finished goes to a backward thread, or waits in a bounded queue, or, where that is full, in its forward
thread. A backward thread goes down; a layer is updated at the moment when its gradient exists, by its own optimizer. Nothing
here is the package's: time goes on by ones, and everybody is asked whether he is done.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Walker:
    """A thread: which micro-batch it has, at which layer, until when."""

    def __init__(self) -> None:
        self.m: int | None = None
        self.layer, self.until = 0, 0


class LayerwiseOracle:
    """One list of layers (each may be several modules), trained in one process.

    Attributes:
        stale: by layer, for each micro-batch in the order of their ends: other updates of the layer between its forward pass
            and its own.
        read, written: by layer and micro-batch, when the forward pass read the weights, and when the gradient was there.
    """

    def __init__(self, layers: list[nn.Sequential], *, forward: list[int], backward: list[int],
                 threads: tuple[int, int] = (1, 2), queue: int = 0, most: int = 10**9, snapshot: bool = False, k: int = 1,
                 lr: float = 0.1, momentum: float = 0.9, clip: float = 0.0) -> None:
        self.layers, self.costs, self.queue_size, self.snapshot, self.k = layers, (forward, backward), queue, snapshot, k
        self.clip, self.most = clip, most  # micro-batches in flight
        self.forwards, self.backwards = ([Walker() for _ in range(n)] for n in threads)
        self.optimizers = [torch.optim.SGD(layer.parameters(), lr=lr, momentum=momentum) for layer in layers]
        n = len(layers)
        self.versions, self.gradients = [0] * n, [0] * n
        self.stale: list[list[int]] = [[] for _ in layers]
        self.read: list[dict[int, int]] = [{} for _ in layers]
        self.written: list[dict[int, int]] = [{} for _ in layers]
        self.seen: list[dict[int, int]] = [{} for _ in layers]
        self.graphs: dict[tuple[int, int], tuple[nn.Module, Any, Any]] = {}
        self.labels: dict[int, Tensor] = {}
        self.above: dict[int, list[Any]] = {}  # gradients on their way down, by micro-batch
        self.losses: list[float] = []

    def train(self, data: list[tuple[Tensor, Tensor]]) -> None:
        """All of ``data``, until nothing is in flight."""
        n, t, queue, fed = len(self.layers), 0, [], 0
        forward, backward = self.costs

        def pass_on() -> None:
            while True:
                free = next((w for w in self.backwards if w.m is None), None)
                done = sorted((w for w in self.forwards if w.m is not None and w.layer == n), key=lambda w: w.m)
                if free is not None and (queue or done):
                    if queue:
                        free.m = queue.pop(0)
                    else:
                        free.m, done[0].m = done[0].m, None
                    free.layer, free.until = n - 1, t + backward[n - 1]
                elif done and len(queue) < self.queue_size:
                    queue.append(done[0].m)
                    done[0].m = None
                else:
                    return

        while fed < len(data) or queue or any(w.m is not None for w in [*self.forwards, *self.backwards]):
            for walker in sorted((w for w in self.backwards if w.m is not None and w.until == t), key=lambda w: w.m):
                self.go_back(walker.m, walker.layer, t)
                walker.layer -= 1
                if walker.layer < 0:
                    walker.m = None
                else:
                    walker.until = t + backward[walker.layer]
            pass_on()
            for walker in sorted((w for w in self.forwards if w.m is not None and w.until == t and w.layer < n),
                                 key=lambda w: w.m):
                walker.layer += 1
                if walker.layer < n:
                    self.go_forward(walker.m, walker.layer, t)
                    walker.until = t + forward[walker.layer]
            pass_on()
            for walker in self.forwards:
                going = {w.m for w in [*self.forwards, *self.backwards] if w.m is not None}
                if walker.m is None and fed < len(data) and len(going) < self.most:
                    walker.m, walker.layer, walker.until = fed, 0, t + forward[0]
                    self.labels[fed] = data[fed][1]
                    self.go_forward(fed, 0, t, data[fed][0])
                    fed += 1
            t += 1

    def go_forward(self, m: int, i: int, t: int, x: Any = None) -> None:
        """On a copy of the layer, so that its graph is its own."""
        x = self.graphs[m, i - 1][2] if x is None else x
        x = tuple(part.detach().requires_grad_() for part in x) if isinstance(x, tuple) else x.detach().requires_grad_(i > 0)
        layer = copy.deepcopy(self.layers[i])
        out = layer(tuple(part.clone() for part in x) if isinstance(x, tuple) else x.clone())  # it may work in place
        for mine, moved in zip(self.layers[i].buffers(), layer.buffers()):
            mine.copy_(moved)
        self.graphs[m, i] = layer, x, out
        self.read[i][m], self.seen[i][m] = t, self.versions[i]

    def go_back(self, m: int, i: int, t: int) -> None:
        layer, x, out = self.graphs.pop((m, i))
        if not self.snapshot:  # what the graph will multiply by is what the weights are now
            for mine, graphs in zip(self.layers[i].parameters(), layer.parameters()):
                graphs.data.copy_(mine)
        if i == len(self.layers) - 1:
            loss = cross_entropy(out, self.labels.pop(m))
            self.losses.append(loss.item())
            (loss / self.k).backward()
        else:
            parts = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(parts, self.above[m])
        self.above[m] = [part.grad for part in (x if isinstance(x, tuple) else (x,))]
        for mine, graphs in zip(self.layers[i].parameters(), layer.parameters()):
            if graphs.grad is not None:
                mine.grad = graphs.grad if mine.grad is None else mine.grad + graphs.grad
        self.written[i][m] = t
        self.stale[i].append(self.versions[i] - self.seen[i].pop(m))
        self.gradients[i] += 1
        if self.gradients[i] % self.k == 0:
            if self.clip:
                nn.utils.clip_grad_norm_(list(self.layers[i].parameters()), self.clip)
            self.optimizers[i].step()
            self.optimizers[i].zero_grad()
            self.versions[i] += 1

    def law(self, i: int, m: int, period: float) -> int:
        """``ceil(R D) - 1``: the staleness of layer i where updates follow one another after ``period``."""
        return math.ceil((self.written[i][m] - self.read[i][m]) / period) - 1
