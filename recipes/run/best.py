"""The best test of a run: kept as a checkpoint to end with, and a reason to stop once nothing better comes."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

TAG = "best"
"""Of its checkpoint, which ``--resume`` does not take for the last one."""


class Scores(Protocol):
    """What is looked at of a run's progress, one entry a stretch."""

    updates: list[int]
    score: list[float]


@dataclass(frozen=True)
class Best:
    """Looks at tests.

    Attributes:
        lower: whether a lower score is better.
        patience: tests without a better one after which a run stops; None for one that goes on.
        folder: of checkpoints, where the best is to be kept.
    """

    lower: bool
    patience: int | None = None
    folder: str | None = None

    @staticmethod
    def of(args: argparse.Namespace, *, lower: bool) -> Best:
        """As ``args`` asks for it."""
        return Best(lower, args.early_stopping_patience, args.save_checkpoint if args.load_best_model_at_end else None)

    def scored(self, score: float) -> float:
        """A test's score as it is compared: nan, which a run gives that has diverged, is worse than any other."""
        worst = math.inf if self.lower else -math.inf
        return worst if math.isnan(score) else score

    def place(self, progress: Scores) -> int | None:
        """The first entry of ``progress`` that has the best score; None before any test."""
        sign = 1 if self.lower else -1
        known = [(sign * score, entry) for entry, score in _tests(progress)]
        return min(known)[1] if known else None

    def exhausted(self, progress: Scores) -> bool:
        """Whether there have been so many tests since the best one that the run should stop."""
        best = self.place(progress)
        since = sum(entry > best for entry, _ in _tests(progress)) if best is not None else 0
        return self.patience is not None and since >= self.patience

    def keep(self, engine: Any, progress: Scores, state: Callable[[], dict[str, Any]]) -> None:
        """Save a checkpoint if the newest entry is the best; a collective call."""
        if self.folder is not None and self.place(progress) == len(progress.score) - 1:
            engine.save_checkpoint(self.folder, tag=TAG, client_state=state(), save_latest=False)

    def restore(self, engine: Any, progress: Scores) -> int | None:
        """Give the model the best one's weights, if the newest are others; a collective call on a drained engine.

        Returns:
            The entry that the weights are of; None if they are the newest.
        """
        best = self.place(progress)
        if self.folder is None or best is None or best == len(progress.score) - 1:
            return None
        if not Path(self.folder, TAG).is_dir():  # the same answer on every rank: it is a folder that all share
            warnings.warn(f"the best test was before --resume, and {self.folder} does not hold its weights: the run ends with "
                          "its last ones", stacklevel=2)
            return None
        engine.load_checkpoint(self.folder, tag=TAG, load_module_only=True)
        return best


def _tests(progress: Scores) -> list[tuple[int, float]]:
    """Entries and scores; a test before all training counts for nothing."""
    return [(entry, score) for entry, (updates, score) in enumerate(zip(progress.updates, progress.score))
            if updates > 0 and not math.isnan(score)]
