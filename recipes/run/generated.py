"""What is shown of a run with an AuxNet: accuracy with generated inputs, their mismatch, cosines to the exact gradient."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from run.training import Progress

Panels = dict[str, Mapping[str, Sequence[float]]]


class Generated:
    """Tests that begin at every stage but the first, beside those of the serial network.

    Args:
        stages: K.
        evaluate: the accuracy from a stage on; a collective call.

    Attributes:
        accuracies: of every test of this process, by stage from 1 on.
    """

    def __init__(self, stages: int, evaluate: Callable[[int], float]) -> None:
        self.stages, self.evaluate = stages, evaluate
        self.accuracies: list[list[float]] = []

    def test(self) -> float:
        """The serial network's accuracy."""
        self.accuracies.append([self.evaluate(stage) for stage in range(1, self.stages)])
        return self.evaluate(0)

    def summary(self, progress: Progress, tracked: Sequence[Mapping[str, Any]], per_epoch: float) -> dict[str, Any]:
        """Entries of the run's summary: the last accuracies, and curves by epoch and stage.

        Args:
            progress: of the run.
            tracked: rows of the gradient tracker.
            per_epoch: micro-batches.
        """
        last = self.accuracies[-1] if self.accuracies else []
        epochs = len(progress.score)
        # A run that was resumed has tested some epochs before.
        tested = [epoch for epoch, score in enumerate(progress.score) if math.isfinite(score)][-len(self.accuracies):]
        by_stage = {f"stage {s}": [math.nan] * epochs for s in range(1, self.stages)}
        for epoch, row in zip(tested, self.accuracies[-len(tested):]):
            for stage, accuracy in enumerate(row, 1):
                by_stage[f"stage {stage}"][epoch] = accuracy
        return {"accuracy_from_stage": [progress.last_score, *last], "accuracy_from_stage_curves": by_stage,
                "mismatch": progress.stage_curves("mismatch"), "cosine": _by_epoch(tracked, epochs, per_epoch)}


def _by_epoch(rows: Sequence[Mapping[str, Any]], epochs: int, per_epoch: float) -> dict[str, list[float]]:
    """Mean cosines of an epoch, by stage."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        found[row["stage"], min(epochs - 1, int(row["micro_batch"] / per_epoch))].append(row["cosine"])
    return {f"stage {stage}": [fmean(found[stage, e]) if (stage, e) in found else math.nan for e in range(epochs)]
            for stage in sorted({stage for stage, _ in found})}


def panels(summary: Mapping[str, Any]) -> Panels:
    """Below the picture."""
    return {"test accuracy from a stage on": summary["accuracy_from_stage_curves"],
            "mismatch of generated inputs": summary["mismatch"], "cosine to the exact gradient": summary["cosine"]}
