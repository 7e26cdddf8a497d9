"""The codecs of all links of one rank: of which kinds they are, what they draw from, and what those that send have learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ds_decoupled.links.places import Codecs
from ds_decoupled.links.writer import Writer

#: Which way a channel goes, and the number that stands for it in the seed of what chance draws.
DIRECTIONS = {"forward": 0, "backward": 1}


def direction_of(channel: str) -> str:
    """Which way a channel goes, by its name."""
    return "backward" if "backward" in channel else "forward"


class Coding:
    """The codecs of a rank's links; link s joins stages s and s+1.

    Args:
        make: new codecs for one side of a channel, by its name.
        seed: of what codecs draw by chance.
        replica: this rank's; replicas and links draw apart, wherever the stages are.
        bottom, top: this rank's lowest and topmost stage.
        every_link: whether codecs act on links within the rank too.

    Attributes:
        writers: of the links within the rank, by direction and link, where codecs act there.
    """

    def __init__(self, make: Callable[[str], Codecs], seed: Callable[[], int], replica: int, bottom: int, top: int,
                 every_link: bool) -> None:
        self._make, self._seed, self._replica = make, seed, replica
        self._ends = {"forward": top, "backward": bottom - 1}
        self._sending: dict[tuple[str, int], Codecs] = {}
        self._receiving: list[Codecs] = []
        within = range(bottom, top) if every_link else range(0)
        self.writers = {(way, link): self._writer(way, way, link) for way in DIRECTIONS for link in within}

    def sender(self, channel: str) -> Writer:
        """What writes the messages that this rank sends on ``channel``."""
        way = direction_of(channel)
        return self._writer(channel, way, self._ends[way])

    def receiver(self, channel: str) -> Codecs:
        """The codecs of what comes to this rank on ``channel``."""
        self._receiving.append(self._make(channel))
        return self._receiving[-1]

    def _writer(self, channel: str, way: str, link: int) -> Writer:
        codecs = self._make(channel)
        if channel in DIRECTIONS:  # others carry what is exact
            self._sending[way, link] = codecs
        return Writer(codecs, lambda: (self._seed(), self._replica, DIRECTIONS[way], link))

    def state_dict(self, stage: int) -> dict[str, Any]:
        """What the codecs that send a stage's activations and gradients have learned, by direction, for a checkpoint."""
        return {way: self._sending[way, link].state_dict() for way, link in _links_from(stage) if (way, link) in self._sending}

    def load_state_dict(self, states: Mapping[int, Mapping[str, Any]], device: torch.device) -> None:
        """The inverse of :meth:`state_dict`, of all stages here. What comes from other ranks is learned anew from what they
        send. A link that was none where the checkpoint was saved starts as if nothing had been sent."""
        for codecs in self._receiving:
            codecs.load_state_dict({}, device)
        for stage, state in states.items():
            for way, link in _links_from(stage):
                if (way, link) in self._sending:
                    self._sending[way, link].load_state_dict(state.get(way, {}), device)


def _links_from(stage: int) -> tuple[tuple[str, int], ...]:
    return ("forward", stage), ("backward", stage - 1)
