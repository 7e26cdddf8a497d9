"""A stage at work: it takes the message that an action needs, lets the stage act, and posts what comes of it.

::

    queue of kind.takes --> stage.act(kind) --> Outcome --> queues of kind.gives
                                                   |--> complete: the optimizer accumulates
                                                   |--> steps:    the optimizer steps
                                                   |--> loss:     told, by the rank's topmost stage
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ds_decoupled.links import LocalLink, Message
from ds_decoupled.optim import StageOptimizer
from ds_decoupled.schedules import Action, Kind, Slot
from ds_decoupled.stages.outcome import Outcome
from ds_decoupled.stages.stage import Stage
from ds_decoupled.watchers.watcher import Watcher


class Worker:
    """One stage, its optimizer and its queues.

    Args:
        stage: whose handlers say what it does in an action.
        optimizer: steps when an update is due.
        queues: by slot; a slot without a queue leads nowhere, and what is given there is dropped.
        tell_loss: where losses go; None where another stage of the rank tells them.
        watchers: are told what the stage made of an action, before the optimizer hears of it.
        stop_after: updates after which the stage learns no more; None for never.
    """

    def __init__(self, stage: Stage, optimizer: StageOptimizer, queues: Mapping[Slot, LocalLink],
                 tell_loss: Callable[[Tensor], None] | None, watchers: Sequence[Watcher], stop_after: int | None) -> None:
        self.stage, self.optimizer, self.queues = stage, optimizer, queues
        self.tell_loss, self.watchers, self.stop_after = tell_loss, watchers, stop_after
        self._stop_if_due()

    def act(self, kind: Kind, micro_batch: int) -> Outcome:
        """One action. For an update ``micro_batch`` is the update's number."""
        # Weights' gradients that were put off lie in the stage, not in a queue; an update takes nothing.
        taken: tuple[Any, ...] = ()
        if kind.takes is not None and kind.takes in self.queues:
            queue = self.queues[kind.takes]
            taken = queue.recv(micro_batch, f"stage {self.stage.index}, {kind.words}: {kind.takes.value}").parts
        outcome = self.stage.act(kind, micro_batch, *taken)
        for slot, parts in outcome.given.items():
            if slot in self.queues:
                self.queues[slot].send(Message(micro_batch, parts))
        self.settle(kind, micro_batch, outcome)
        return outcome

    def settle(self, kind: Kind, micro_batch: int, outcome: Outcome) -> None:
        """What follows from an action of the stage, beside its messages: watchers, loss and optimizer hear of it."""
        # Before the optimizer: in bf16 it moves the gradients away to its float32 copies.
        for watcher in self.watchers:
            watcher.acted(Action(self.stage.index, kind, micro_batch), outcome)
        if outcome.loss is not None and self.tell_loss is not None:
            self.tell_loss(outcome.loss)
        if outcome.complete:
            self.optimizer.accumulate()
        if outcome.steps:
            self.optimizer.step()
            self._stop_if_due()

    def _stop_if_due(self) -> None:
        if self.stop_after is not None and not self.stage.stopped and self.optimizer.updates >= self.stop_after:
            self.stage.stop()

    def report(self) -> dict[str, Any]:
        """The most micro-batches that were in flight at once, the updates made, and what the stage itself has to tell."""
        return {"records": self.stage.peak_in_flight, "updates": self.optimizer.updates, **self.stage.report()}

    def state_dict(self) -> dict[str, Any]:
        """The stage with what is in flight, and its optimizer."""
        return {"stage": self.stage.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], load_optimizer: bool = True, load_lr_scheduler: bool = True) -> None:
        """The inverse of :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"], load_optimizer, load_lr_scheduler)
        self.stage.load_state_dict(state["stage"])

    def weights_replaced(self) -> None:
        """The weights were loaded alone."""
        self.optimizer.weights_replaced()
