"""What asynchronous greedy learning means: a slow, plain loop, from the definition (arXiv 2106.06401, replay buffers).

A stage at its turn takes a micro-batch (a new one, or one from the buffer before it: fewest uses first, of these the newest),
learns from its own loss, and puts its output, as the loss saw it, into the buffer above. Who has the next turn is drawn, or
follows from durations. With a lesson a stage that has a head gets no gradient in its first updates, and the head steps by a
rate of its own. Nothing here is the package's: turns, buffers and learning are written out.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from local_oracle import rate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class SlowBuffer:
    """A list of ``[content, uses]``, the oldest first."""

    def __init__(self, size: int, cap: int | None = None, oldest: bool = False) -> None:
        self.size, self.cap, self.oldest = size, cap, oldest
        self.entries: list[list[Any]] = []
        self.gone: list[int] = []  # uses of what had to go

    def put(self, content: Any) -> None:
        self.entries.append([content, 0])
        if len(self.entries) > self.size:
            self.gone.append(self.entries.pop(0)[1])

    def take(self) -> Any:
        best: list[Any] | None = None
        for entry in self.entries:
            better = best is None or entry[1] < best[1] or (entry[1] == best[1] and not self.oldest)
            if better and (self.cap is None or entry[1] < self.cap):
                best = entry
        if best is None:
            return None
        best[1] += 1
        return best[0]

    @property
    def unseen(self) -> bool:
        return any(uses == 0 for _, uses in self.entries)


class AsyncOracle:
    """One list of stages, trained in one process."""

    def __init__(self, stages: list[nn.Sequential], heads: list[nn.Module | None], *, size: int, cap: int | None = None,
                 oldest: bool = False, warm: bool = True, seed: int = 0, slow: list[float] | None = None,
                 durations: list[float] | None = None, k: int = 1, lr: float = 0.1, momentum: float = 0.9,
                 stop_after: list[int | None] | None = None, lesson: dict[str, Any] | None = None) -> None:
        self.stages, self.heads, self.k, self.warm, self.size = stages, heads, k, warm, size
        J = len(stages)
        self.slow, self.durations = slow or [1.0] * J, durations
        self.random = random.Random(seed)
        self.buffers = [SlowBuffer(size, cap, oldest) for _ in stages]
        self.parameters = [[*s.parameters(), *([] if h is None else h.parameters())] for s, h in zip(stages, heads)]
        self.lr, self.lesson = lr, lesson
        self.optimizers = [torch.optim.SGD([{"params": list(part.parameters())} for part in (s, h or nn.Identity())], lr=lr,
                                           momentum=momentum) for s, h in zip(stages, heads)]
        self.turns, self.updates, self.idle = [0] * J, [0] * J, [0] * J
        self.stop_after = stop_after or [None] * J

    def train(self, data: list[tuple[Tensor, Tensor]]) -> None:
        """All of ``data`` through stage 0, and whoever has a turn before stage 0 would have one more; then the rest goes up."""
        J, source = len(self.stages), iter(data)
        if self.warm:
            for _ in range(min(self.size, len(data))):
                for s in range(J):
                    self.turn(s, source)
        if self.turns[0] == len(data) < self.size and self.warm:
            return self.drain(source)
        for s in self.order():
            if s == 0 and self.turns[0] == len(data):
                break
            if self.turn(s, source):
                self.told.append(s)
            else:
                self.idle[s] += 1
        return self.drain(source)

    def order(self) -> Any:
        """Stages, in the order of their turns. ``self.told`` has those that acted since the last one."""
        self.told: list[int] = []
        J = len(self.stages)
        if self.durations is None:
            if not self.warm:
                yield 0  # the first turn is stage 0's
            while True:
                value, total = self.random.random() * sum(1 / f for f in self.slow), 0.0
                for s in range(J):
                    total += 1 / self.slow[s]
                    if value < total:
                        yield s
                        break
        # Times at which stages may act again; None: it waits for something to come.
        now = 0.0
        free: list[float | None] = [d * f if self.warm else None for d, f in zip(self.durations, self.slow)]
        if not self.warm:
            free[0] = 0.0
        while True:
            now, s = min((t, s) for s, t in enumerate(free) if t is not None)
            self.told.clear()
            yield s
            free[s] = now + self.durations[s] * self.slow[s] if self.told else None
            if self.told and s + 1 < J and free[s + 1] is None:
                free[s + 1] = now

    def turn(self, s: int, source: Any) -> bool:
        taken = next(source) if s == 0 else self.buffers[s].take()
        if taken is None:
            return False
        x, y = taken
        self.turns[s] += 1
        stage, head = self.stages[s], self.heads[s]
        done = self.stop_after[s] is not None and self.updates[s] >= self.stop_after[s]
        if done:
            stage.eval()
            with torch.no_grad():
                out = stage(x)
        else:
            x = tuple(t.detach() for t in x) if isinstance(x, tuple) else x.detach()
            out = stage(x)
            seen = out if head is None else head(out)
            loss = cross_entropy(seen.flatten(0, -2), y.flatten())
            taught = head is not None and self.is_lesson(s)
            learn = list(head.parameters()) if taught else self.parameters[s]
            for p, g in zip(learn, torch.autograd.grad(loss / self.k, learn)):
                p.grad = g.clone() if p.grad is None else p.grad + g
        if s + 1 < len(self.stages):
            sent = tuple(t.detach() for t in out) if isinstance(out, tuple) else out.detach()
            self.buffers[s + 1].put((sent, y))
        if self.turns[s] % self.k == 0 and not done:
            taught = head is not None and self.is_lesson(s)
            self.optimizers[s].param_groups[1]["lr"] = rate(self.updates[s], **self.lesson) if taught else self.lr
            self.optimizers[s].step()
            self.optimizers[s].zero_grad()
            self.updates[s] += 1
        return True

    def is_lesson(self, s: int) -> bool:
        return self.lesson is not None and self.updates[s] < self.lesson["updates"]

    def drain(self, source: Any) -> None:
        """What was never used goes up, from the topmost buffer to the lowest."""
        for s in reversed(range(1, len(self.stages))):
            while self.buffers[s].unseen:
                for above in range(s, len(self.stages)):
                    self.turn(above, source)
