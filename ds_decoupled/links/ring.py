"""A replay ring: what was sent to a stage, kept to be used again, in the order of :mod:`ds_decoupled.schedules.replay`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ds_decoupled.errors import LinkError
from ds_decoupled.links.local import LocalLink
from ds_decoupled.links.message import Message
from ds_decoupled.schedules.replay import Replay, ReplayOrder
from ds_decoupled.tensors import on_device


class ReplayRing(LocalLink):
    """The input of one stage: M whole micro-batches, activations and labels.

    Args:
        replay: the rule.
        memory: where messages lie.
        device: where they are used.

    Attributes:
        order: the numbers of what is here, and their uses.
    """

    def __init__(self, replay: Replay, memory: torch.device, device: torch.device) -> None:
        super().__init__()
        self.order = ReplayOrder(replay)
        self.memory, self.device = memory, device
        self._messages: dict[int, Message] = {}

    def send(self, message: Message) -> None:
        """``message`` has come; with a full ring the oldest one goes."""
        gone = self.order.put(message.micro_batch)
        if gone is not None:
            del self._messages[gone]
        self._messages[message.micro_batch] = replace(message, parts=on_device(message.parts, self.memory))

    def recv(self, micro_batch: int, what: str) -> Message:
        """The message whose turn it is, whatever number the stage gives its own turn."""
        number = self.order.draw()
        if number is None:
            raise LinkError(f"{what}: the replay ring has nothing to use")
        message = self._messages[number]
        return replace(message, parts=on_device(message.parts, self.device))

    @property
    def nbytes(self) -> int:
        """Bytes of what is here."""
        return sum(message.nbytes for message in self._messages.values())

    def report(self, k: int) -> dict[str, Any]:
        """Counts, see :meth:`ReplayOrder.report`, and ``bytes``."""
        return {**self.order.report(k), "bytes": self.nbytes}

    def state_dict(self) -> dict[str, Any]:
        """The messages, and the order."""
        return {"order": self.order.state_dict(),
                "messages": [(message.micro_batch, message.parts) for message in self._messages.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.order.load_state_dict(state["order"])
        self._messages = {number: Message(number, on_device(parts, self.memory)) for number, parts in state["messages"]}
