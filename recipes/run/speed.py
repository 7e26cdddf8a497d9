"""How fast a run is, in images or tokens and as a share of what its devices could do; and lines that say so."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class Speed:
    """Says how fast.

    Attributes:
        samples: of an update, over all replicas.
        unit: what samples are made of, in the plural.
        units: of them in a sample.
        flops: of the model, forward and back, for one unit.
        peak_flops: that all devices could do in a second; None where it is not known.
    """

    samples: int
    unit: str = "samples"
    units: int = 1
    flops: float = 0.0
    peak_flops: float | None = None

    def rate(self, updates: int, seconds: float) -> float:
        """Units in a second; nan for no time."""
        return updates * self.samples * self.units / seconds if seconds > 0 else math.nan

    def mfu(self, rate: float) -> float | None:
        """Model FLOPs utilization (arXiv 2204.02311, appendix B, without attention's own), at so many units a second."""
        return None if self.peak_flops is None else rate * self.flops / self.peak_flops

    def words(self, updates: int, seconds: float) -> str:
        """Such as ``812 tokens/s, MFU 3.1%``."""
        rate = self.rate(updates, seconds)
        mfu = self.mfu(rate)
        return f"{rate:.0f} {self.unit}/s" + ("" if mfu is None else f", MFU {mfu:.1%}")


class Lines:
    """A line every so many updates, to be read and searched later, on rank 0; its speed goes to DeepSpeed's monitor too.

    Args:
        every: updates from line to line; None for none.
    """

    def __init__(self, every: int | None, engine: Any, speed: Speed, bar: tqdm[Any]) -> None:
        self.every, self.engine, self.speed, self.bar = every, engine, speed, bar
        self._losses: list[Tensor] = []
        self._start = self._seconds = 0.0

    def begin(self) -> None:
        """Training begins, or goes on behind a test."""
        self._start = time.perf_counter()

    def pause(self) -> None:
        """It stops for something else, whose time is not its own."""
        self._seconds += time.perf_counter() - self._start

    def add(self, update: int, loss: Tensor) -> None:
        """An update has been made."""
        if self.every is None or dist.get_rank() != 0:
            return
        self._losses.append(loss)
        if update % self.every:
            return
        mean = torch.stack(self._losses).nanmean().item()
        seconds = self._seconds + time.perf_counter() - self._start
        rate = next(iter(self.engine.get_lr() or []), math.nan)
        self.bar.write(f"update {update}: loss {mean:.4f}, rate {rate:.3g}, {self.speed.words(len(self._losses), seconds)}")
        if self.engine.monitor.enabled:
            name = f"Train/Samples/{self.speed.unit}_per_second"
            self.engine.monitor.write_events([(name, self.speed.rate(len(self._losses), seconds), self.engine.global_samples)])
        self._losses.clear()
        self._start, self._seconds = time.perf_counter(), 0.0
