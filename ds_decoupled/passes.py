"""The one way that a batch goes through all ranks outside of training: up, stage by stage, leaving nothing behind.

Evaluation, the exact gradients of :mod:`ds_decoupled.watchers.gradients` and the shapes that heads are built from go this way::

    rank 0: source() -> its stages --channel--> rank 1: its stages --channel--> ... -> the last rank's result

Every pass has a channel of its own, so that it may come at any time and meets no message of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ds_decoupled.errors import PeerError, one_line
from ds_decoupled.links import Message
from ds_decoupled.network import Network, data_failed
from ds_decoupled.stages.stage import Stage
from ds_decoupled.tensors import Tensors

Through = Callable[[Stage, Tensors, list[Any]], Tensors]
"""What a stage makes of its input; the list is what travels beside it (labels first), and may grow."""


class NoBatch(Exception):
    """A batch does not come.

    Attributes:
        error: why: what the first rank's source raised; on the ranks above StopIteration for its StopIteration, and for
            anything else a :class:`PeerError` that says the same.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Passes:
    """Passes through the stages of all ranks.

    Args:
        network: this rank's links.
        stages: this rank's, by number.
    """

    def __init__(self, network: Network, stages: Mapping[int, Stage]) -> None:
        self.network, self.stages = network, stages

    def expect(self, channel: str, count: int, first: int = 0) -> None:
        """``count`` batches follow on ``channel``, numbered from ``first``; to be called before :meth:`forward`."""
        receiver = self.network.channels[channel].receiver
        if receiver is not None:
            # An earlier pass may have found the end of its data, and this one brings data of its own.
            receiver.start()
            receiver.expect(range(first, first + count))

    def forward(self, channel: str, number: int, source: Callable[[], tuple[Any, ...]], through: Through,
                tell: bool = False) -> tuple[Tensors, list[Any]]:
        """Take one batch through this rank's stages, and hand it on.

        Args:
            channel: which way it goes.
            number: of the batch.
            source: gives ``(inputs, labels)`` on the first rank.
            through: applied to every stage in turn.
            tell: whether an error in ``through`` is one of the batch, of which the ranks above learn as of one in ``source``.

        Returns:
            What this rank's topmost stage gave, and what travels beside it.

        Raises:
            NoBatch: if ``source`` failed, on this rank or on the first.
            LinkError: if the rank below is gone.
            Exception: what ``through`` raised.
        """
        sender = self.network.channels[channel].sender
        try:
            x, *beside = self._take(channel, number, source)
        except NoBatch as missing:
            self._tell(channel, number, missing.error)
            raise
        try:
            for stage in self.stages.values():
                x = through(stage, x, beside)
        except Exception as error:
            if tell:
                self._tell(channel, number, error)
            raise
        if sender is not None:
            sender.send(Message(number, (x, *beside)))
        return x, beside

    def take_back(self, channel: str, number: int) -> Any:
        """What the rank above sends down after a :meth:`forward`."""
        receiver, top = self.network.channels[channel].receiver, max(self.stages)
        assert receiver is not None
        receiver.expect([number])
        message = receiver.recv(number, self.network.waiting(top, top + 1, f"the {channel}", number))
        assert message is not None
        return message.opened().parts[0]

    def hand_back(self, channel: str, number: int, value: Any) -> None:
        """Send ``value``, a tensor or a tuple of them, to the rank below, if there is one."""
        sender = self.network.channels[channel].sender
        if sender is not None:
            sender.send(Message(number, (value,)))

    def _take(self, channel: str, number: int, source: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        receiver = self.network.channels[channel].receiver
        if receiver is None:
            try:
                return source()
            except Exception as error:
                raise NoBatch(error) from error
        bottom = min(self.stages)
        message = receiver.recv(number, self.network.waiting(bottom, bottom - 1, f"the {channel}", number))
        if message is None:
            raise NoBatch(data_failed(receiver) or StopIteration())
        return message.opened().parts

    def _tell(self, channel: str, number: int, error: Exception) -> None:
        """The next rank learns why ``number`` and those after it will not come."""
        sender = self.network.channels[channel].sender
        if sender is not None:
            reason = error.reason if isinstance(error, PeerError) else one_line(error)
            sender.send_end(number, None if isinstance(error, StopIteration) else reason)


@contextmanager
def as_in_evaluation(stages: Iterable[Stage]) -> Iterator[None]:
    """Within, the layers of ``stages`` are in evaluation mode; behind, modes and buffers are what they were."""
    modules = [m for stage in stages for layer in stage.layers if isinstance(layer, nn.Module) for m in layer.modules()]
    training = [m.training for m in modules]
    with ExitStack() as held:
        for m in modules:
            m.training = False
        for stage in stages:
            held.enter_context(stage.buffers.held())
        try:
            yield
        finally:
            for m, mode in zip(modules, training):
                m.training = mode
