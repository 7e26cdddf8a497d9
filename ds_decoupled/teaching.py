"""Teaching heads to read their stage, before the stage may learn from them.

A head that does not read its stage teaches it nonsense, and a pretrained stage has much to lose. So in the first calls of
``train_batch`` every stage is still, and heads alone learn, by a rate of their own::

    rank 0                      rank 1 (the last)
    F F F F --outputs-->        F F F F                 the k micro-batches of an update, in evaluation, one after the other
    head of each  <--stream--   what its last layer took, if the target is the model

``"target": "labels"`` is the loss that the stage will learn from. ``"target": "model"`` is the whole model's own distribution
of every token, which says more than one label does. What comes down for it is the stream before the last layer, not the
distribution: every head of such a kind ends in that layer anyway, and a stream is smaller by vocabulary over width (SmolLM2:
85 times). No stage needs another's head, so that ranks teach side by side.

The trunk is the same before and behind; micro-batches are counted, and are those of the data like any others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.collectives import gather
from ds_decoupled.feed import MicroBatch
from ds_decoupled.passes import NoBatch, Passes, as_in_evaluation
from ds_decoupled.settings.teaching import TeachingSettings
from ds_decoupled.stages.lesson import Lesson
from ds_decoupled.stages.local import LocalStage
from ds_decoupled.stages.stage import Stage
from ds_decoupled.tensors import Tensors, detach

_UP, _DOWN = "beside forward", "beside backward"


@dataclass
class _Went:
    """A micro-batch that has passed.

    Attributes:
        outputs: of the stages here whose heads are taught.
        labels: that travelled along.
        stream: what the last layer took, on the last rank.
    """

    outputs: dict[int, Tensors] = field(default_factory=dict)
    labels: Any = None
    stream: Tensors | None = None


class HeadTeaching:
    """The lessons of a rank's heads.

    Args:
        passes: the way through all ranks' stages.
        settings: of the lessons.
        tell_loss: is given what the rank deals with: the last stage's loss on its rank, elsewhere that of the topmost head.

    Attributes:
        seconds: that it took.
        bytes_sent: to other ranks, for it.
    """

    def __init__(self, passes: Passes, settings: TeachingSettings, tell_loss: Callable[[Tensor], None]) -> None:
        self.passes, self.settings, self.tell_loss = passes, settings, tell_loss
        self.stages = {index: stage for index, stage in passes.stages.items() if isinstance(stage, LocalStage)}
        self.taught = {index: stage for index, stage in self.stages.items() if stage.head is not None}
        self.seconds, self.bytes_sent = 0.0, 0

    @property
    def _lessons(self) -> list[Lesson]:
        return [stage.lesson for stage in self.stages.values() if stage.lesson is not None]

    @property
    def done(self) -> int:
        """Updates that heads have made, on every rank alike."""
        return self._lessons[0].done

    @property
    def due(self) -> bool:
        """Whether heads are taught in the next call."""
        return not self._lessons[0].over

    def _sent(self) -> int:
        senders = [self.passes.network.channels[name].sender for name in (_UP, _DOWN)]
        return sum(sender.bytes_sent for sender in senders if sender is not None)

    def update(self, k: int, batches: list[MicroBatch] | Exception | None) -> Exception | None:
        """One update of every head. A collective call of a pipeline's ranks.

        Args:
            k: micro-batches of an update.
            batches: on the first rank these, or why there are none.

        Returns:
            Why there were none, on every rank.
        """
        start, sent = time.perf_counter(), self._sent()
        source = _source(batches)
        numbers = range(self.done * k, (self.done + 1) * k)
        went = []
        with torch.no_grad(), as_in_evaluation(self.passes.stages.values()):
            self.passes.expect(_UP, k, numbers.start)
            for number in numbers:
                try:
                    went.append(self._forward(number, source))
                except NoBatch as missing:
                    return missing.error
        # Streams come down when all have gone up: a rank that waited for room on the one way could not take from the other.
        for number, micro_batch in zip(numbers, went):
            self._teach(number, micro_batch)
        for lesson in self._lessons:
            lesson.update()
        self.bytes_sent += self._sent() - sent
        self.seconds += time.perf_counter() - start
        return None

    def _forward(self, number: int, source: Callable[[], MicroBatch]) -> _Went:
        went = _Went()

        def note(layer: Any, given: Any, made: Any) -> None:
            if layer is last.layers[-1]:
                went.stream = detach(given)

        def through(stage: Stage, x: Tensors, beside: list[Any]) -> Tensors:
            outputs = stage.plain_forward(number, x)
            if stage.index in self.taught:
                went.outputs[stage.index] = outputs
            return outputs

        last = self.passes.stages[max(self.passes.stages)]
        with last.listening(note):
            outputs, (went.labels, *_) = self.passes.forward(_UP, number, source, through)
        if last.is_last:
            self.tell_loss(last.loss(outputs, went.labels))
        return went

    def _teach(self, number: int, went: _Went) -> None:
        said = None
        if self.settings.target == "model":
            top = self.passes.stages[max(self.passes.stages)]
            stream = went.stream if top.is_last else self.passes.take_back(_DOWN, number)
            assert stream is not None
            self.passes.hand_back(_DOWN, number, stream)
            said = next(iter(self.taught.values())).says(stream) if self.taught else None
        for index, outputs in went.outputs.items():
            stage = self.taught[index]
            loss = stage.teach(number, outputs, went.labels, said)
            assert stage.lesson is not None
            stage.lesson.tell(loss)
            if index == max(self.passes.stages):
                self.tell_loss(loss)

    def report(self, samples: int) -> dict[str, Any]:
        """What the summary tells. A collective call.

        Args:
            samples: of an update, over all replicas.
        """
        parts = gather((self.seconds, self.bytes_sent, {index: stage.lesson.losses for index, stage in self.taught.items()
                                                        if stage.lesson is not None}))
        losses: Mapping[int, list[float]] = {index: told for *_, by_stage in parts for index, told in by_stage.items()}
        return {"updates": self.done, "of": self.settings.updates, "target": self.settings.target,
                "samples": self.done * samples, "seconds": max(seconds for seconds, *_ in parts),
                "bytes_sent": sum(sent for _, sent, _ in parts),
                "losses": {index: losses[index] for index in sorted(losses)}}


def _source(batches: list[MicroBatch] | Exception | None) -> Callable[[], MicroBatch]:
    left: Iterator[MicroBatch] = iter(batches if isinstance(batches, list) else ())

    def source() -> MicroBatch:
        if isinstance(batches, Exception):
            raise batches
        return next(left)

    return source
