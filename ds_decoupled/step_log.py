"""What is told after every call of ``train_batch``: DeepSpeed's counters, its monitor's events, its lines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_decoupled.compat import PipelineEngineBase
from ds_decoupled.losses import Losses
from ds_decoupled.slow_updates import SlowUpdates
from ds_decoupled.watchers import Breakdown


class StepLog:
    """Counts, logs and monitors as DeepSpeed's pipeline engine does.

    Args:
        engine: whose counters move.
        breakdown: what ``wall_clock_breakdown`` measures; None where it is off.

    Attributes:
        seconds: spent in ``train_batch``.
    """

    def __init__(self, engine: PipelineEngineBase, breakdown: Breakdown | None) -> None:
        self.engine, self.breakdown = engine, breakdown
        self.seconds = 0.0
        # On a device the threads of the CPU are not what updates wait for.
        self._slow = SlowUpdates(torch.get_num_threads() if engine.device.type == "cpu" else 1)

    def restart(self) -> None:
        """The pipeline is empty, or k is another: updates take another time from here on."""
        self._slow.restart()

    def took(self, seconds: float, whole: bool) -> None:
        """A call of ``train_batch`` took so long; ``whole``: the pipeline was full when it began. Calls that fill it do less,
        and would be the quickest."""
        self.seconds += seconds
        if whole:
            self._slow.add(seconds)

    def after_batch(self, losses: Losses, loss: Tensor, beside: Callable[[], str] = str) -> None:
        """A call has made its update. While the pipeline fills it has no loss, and none is told; ``beside``: what
        else there is to tell."""
        engine = self.engine
        engine.global_steps += 1
        engine.global_samples += engine.train_batch_size()
        engine.agg_train_loss = loss
        if losses.additional:
            engine.agg_additional_losses = losses.additional
        if engine.global_rank == 0 and engine.monitor.enabled and losses:
            rates = engine.get_lr()[:1]  # none on a rank with nothing to train
            engine.monitor.write_events([("Train/Samples/train_loss", loss.item(), engine.global_samples),
                                         *(("Train/Samples/lr", rate, engine.global_samples) for rate in rates)])
        every = engine.steps_per_print()
        if every is None or engine.global_steps % every:
            return
        if engine.global_rank == 0:
            rate = engine.train_batch_size() * engine.global_steps / self.seconds
            shown = {"loss": loss, **(losses.additional or {})} if losses else {}
            more = beside()
            told = " ".join(f"{name}: {value.item():0.4f}" for name, value in shown.items()) or "loss: none yet"
            print(f"steps: {engine.global_steps} {told} samples/sec: {rate:0.3f}{' ' * bool(more)}{more}", flush=True)
        if self.breakdown is not None:
            print(self.breakdown.line(engine.global_steps), flush=True)
