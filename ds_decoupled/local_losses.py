"""What the engine does for stages with losses of their own, beside running their plan: heads, their refresh, stops, reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_decoupled.collectives import gather
from ds_decoupled.nn.heads import SharedReadout
from ds_decoupled.settings.placed import check_local as check_local
from ds_decoupled.stages import LocalStage
from ds_decoupled.stages.heads import build_heads, refresh

if TYPE_CHECKING:
    from ds_decoupled.engine import DecoupledPipelineEngine


class LocalLosses:
    """The stage-local losses of one rank.

    Args:
        engine: whose stages have been built, and get their heads here. A collective call.

    Attributes:
        readout: this rank's copy of the model's last layer, where heads share it.
        bytes_sent: to other ranks for its sake, of which the rank of the last stage sends all.
    """

    def __init__(self, engine: DecoupledPipelineEngine) -> None:
        self.engine, self.config = engine, engine.decoupled
        self.stages = {s: stage for s, stage in engine.stages.items() if isinstance(stage, LocalStage)}
        self.readout: SharedReadout | None = build_heads(engine)
        self.bytes_sent = 0
        self._stop_if_due()

    def before_batch(self, ended: bool) -> None:
        """What is due before every ``head_refresh``-th call of ``train_batch``; all ranks are at the same tick then, so that
        the numbers are those of any number of ranks."""
        if self.readout is not None and not ended and self.engine.global_steps % self.config.head_refresh == 0:
            self.bytes_sent += refresh(self.engine, self.readout)

    def after_update(self, stage: int) -> None:
        """``stage`` has made an update."""
        self._stop_if_due(stage)

    def _stop_if_due(self, only: int | None = None) -> None:
        if self.config.stop_after is None:
            return
        for s, stage in self.stages.items():
            limit = self.config.stop_after[s]
            optimizer = self.engine.stage_optimizers.get(s)
            if only in (None, s) and limit is not None and (optimizer.updates if optimizer is not None else 0) >= limit:
                stage.stop()

    def metrics(self) -> list[dict[str, float]]:
        """By stage; a collective call."""
        found = {s: metrics for part in gather({s: stage.take_metrics() for s, stage in self.stages.items()})
                 for s, metrics in part.items()}
        return [found[s] for s in sorted(found)]
