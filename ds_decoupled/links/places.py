"""The codecs of a channel: every tensor of a message has one by its place, and a codec that learns has one of its own there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.links.codec import Codec

_AS_IT_IS = Codec()


class Codecs:
    """One side's codecs of one channel.

    Args:
        parts: of a message's parts, by their places; parts behind the last travel as they are.
    """

    def __init__(self, *parts: Codec) -> None:
        self.parts = parts
        self._own: dict[tuple[int, int], Codec] = {}

    @property
    def trivial(self) -> bool:
        """Whether all travels as it is."""
        return all(type(codec) is Codec for codec in self.parts)

    def at(self, part: int, position: int) -> Codec:
        """The codec of the tensor at ``position`` of a part, from 0."""
        if part >= len(self.parts):
            return _AS_IT_IS
        if (part, position) not in self._own:
            self._own[part, position] = self.parts[part].own()
        return self._own[part, position]

    def state_dict(self) -> dict[tuple[int, int], dict[str, Any]]:
        """What the sender's codecs keep, by place."""
        states = {place: codec.state_dict() for place, codec in self._own.items()}
        return {place: state for place, state in states.items() if state}

    def load_state_dict(self, state: Mapping[tuple[int, int], Mapping[str, Any]], device: torch.device) -> None:
        """The inverse of :meth:`state_dict`, with tensors on ``device``. Codecs that are not in it start anew: all of a
        receiver's."""
        self._own.clear()
        for (part, position), own in state.items():
            self.at(part, position).load_state_dict(_on(own, device))


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _on(v, device) for name, v in value.items()}
    return tuple(_on(v, device) for v in value) if isinstance(value, tuple) else value
