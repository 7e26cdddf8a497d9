"""What an AuxNet costs, beside the layers whose inputs it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_decoupled.stages.auxiliary import AuxiliaryStage
from ds_decoupled.watchers.watcher import Watcher


class AuxNetCost(Watcher):
    """Counts multiply-adds of a sample, by stage: of its layers, of its step of the AuxNet, and of what predicts multipliers.

    Args:
        stages: of this rank, by number.
    """

    def __init__(self, stages: Mapping[int, AuxiliaryStage]) -> None:
        self.stages = stages

    def report(self) -> dict[int, tuple[int, int, int]]:
        return {index: stage.counted for index, stage in self.stages.items()}

    def merge(self, reports: list[dict[int, tuple[int, int, int]]]) -> dict[str, Any]:
        by_stage = [counted for _, counted in sorted(item for report in reports for item in report.items())]
        layers, steps, adjoints = (list(column) for column in zip(*by_stage))
        share = (sum(steps) + sum(adjoints)) / max(1, sum(layers))
        return {"auxnet": {"layers": layers, "steps": steps, "adjoints": adjoints, "share": share}}
