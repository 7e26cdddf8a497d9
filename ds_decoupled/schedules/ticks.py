"""In which tick a stage meets a micro-batch.

Hops ``(a, b)`` say how many ticks a message takes from stage to stage, forward and backward. Stage ``s`` of ``J`` runs
the forward of micro-batch ``m`` in tick ``m + a s`` and its backward in tick ``m + a(J-1) + b(J-1-s)``; the last stage
does both in one tick. For J = 3 and hops (1, 1), the paper's PETRA::

    tick   stage 0   stage 1   stage 2
       0   F0
       1   F1        F0
       2   F2        F1        X0
       3   F3        F2 B0     X1
       4   F4 B0     F3 B1     X2

With stage-local losses and a window of n, the loss of stage ``s + j`` reaches stage ``s`` for j < n: its gradient comes in
tick ``m + a(s+j) + b j``, and the stage's backward is the last of these. A window of 1 waits for nobody. For J = 4, n = 2,
hops (0, 1)::

    tick   stage 0   stage 1   stage 2   stage 3
       0   H0        H0        H0        X0
       1   H1 B0     H1 B0     H1 B0     X1
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Ticks:
    """When each stage meets each micro-batch; micro-batches and ticks count from the start of a run (or a drain).

    Attributes:
        hops: ``(a, b)``.
        depth: one number per stage, not falling: how many times a message has hopped when it reaches the stage. With a
            delayed update this is the stage's own number, whatever the placement, because it is part of the method.
            Under a flush no gradient depends on it, so that the depth may be the rank's, which makes it 1F1B.
        window: stages whose losses reach a stage, its own among them; 0 where the only loss is the last stage's.
        first_loss: the lowest stage whose loss anybody learns from; above 0 where a stage takes the farthest loss alone.
    """

    hops: tuple[int, int]
    depth: tuple[int, ...]
    window: int = 0
    first_loss: int = 0

    @staticmethod
    def delayed(stages: int, hops: tuple[int, int]) -> Ticks:
        """Ticks of a method with a delayed update."""
        return Ticks(hops, tuple(range(stages)))

    @staticmethod
    def local(stages: int, hops: tuple[int, int], window: int, farthest: bool = False) -> Ticks:
        """Ticks of a method with stage-local losses, of all the window's or of its farthest."""
        return Ticks(hops, tuple(range(stages)), window, min(window, stages) - 1 if farthest else 0)

    @staticmethod
    def together(stages: int) -> Ticks:
        """Ticks of stages that all work on the same micro-batch: nobody's input waits for another's output."""
        return Ticks((0, 1), (0,) * stages)

    @staticmethod
    def flush(ranks: tuple[int, ...]) -> Ticks:
        """1F1B: ``ranks[s]`` is the rank that holds stage ``s``."""
        return Ticks((0, 1), ranks)

    @property
    def stages(self) -> int:
        return len(self.depth)

    def forward(self, stage: int, micro_batch: int) -> int:
        """The tick of a stage's forward pass."""
        return micro_batch + self.hops[0] * self.depth[stage]

    def backward(self, stage: int, micro_batch: int) -> int:
        """The tick of a stage's (last) backward pass."""
        if self.window:
            return self.gradient(stage, self.reach(stage), micro_batch)
        # Up from this stage to the last, which goes back in the tick of its forward, and down again.
        a, b = self.hops
        last = self.depth[-1]
        return micro_batch + a * last + b * (last - self.depth[stage])

    def reach(self, stage: int) -> int:
        """How many losses above the stage's own reach it, with stage-local losses."""
        return min(self.window - 1, self.stages - 1 - stage)

    def gradient(self, stage: int, distance: int, micro_batch: int) -> int:
        """The tick in which the loss of ``stage + distance`` reaches ``stage``."""
        return self.forward(stage + distance, micro_batch) + self.hops[1] * distance

    def delay(self, stage: int) -> int:
        """Ticks between a stage's forward and backward of the same micro-batch: ``(a+b)(J-1-s)``, with a window
        ``(a+b) min(n-1, J-1-s)``."""
        return self.backward(stage, 0) - self.forward(stage, 0)

    def updates_crossed(self, stage: int, k: int) -> int:
        """The most updates of the stage between a forward and its backward: ``ceil(delay / k)``."""
        return math.ceil(self.delay(stage) / k)

    def records(self, stage: int) -> int:
        """Micro-batches in flight at a stage in the steady state: ``delay + 1``."""
        return self.delay(stage) + 1

    @property
    def drain(self) -> int:
        """Ticks from a micro-batch's first forward to its last backward."""
        return max(self.backward(s, 0) for s in range(self.stages))
