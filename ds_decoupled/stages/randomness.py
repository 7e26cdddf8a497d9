"""Random numbers that depend on the layer and the micro-batch alone.

Dropout must draw the same mask when a forward pass is run again, and the same mask wherever the stage is placed. So no
generator state is kept: every layer of every micro-batch has a seed of its own, and the global generators are left as
they were found.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

_MASK = (1 << 63) - 1


def mix(*numbers: int) -> int:
    """A seed from whole numbers (splitmix64 steps): near inputs give unrelated seeds."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & ((1 << 64) - 1)
        state ^= state >> 31
    return state & _MASK


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, torch's generators start from ``seed``; outside, nothing has happened to them."""
    # fork_rng's own default asks every device, and warns where there are many.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return generators


def drawn_seed() -> int:
    """A seed from torch's generator as it stands, which does not move: two runs with the same ``torch.manual_seed`` get the
    same one."""
    with torch.random.fork_rng(devices=[]):
        return int(torch.randint(_MASK, ()).item())


@dataclass
class LayerSeeds:
    """Seeds of the layers of one replica.

    Attributes:
        base: the run's seed; a checkpoint brings its own.
        replica: the data-parallel rank, so that replicas draw different masks.
        device: the device whose generator is seeded beside the CPU's.
        own: the user's way, called with the layer and the micro-batch in place of all this
            (``PipelineModule(seed_layers=True)``).
    """

    base: int
    replica: int
    device: torch.device
    own: Callable[[int, int], None] | None = None

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Leave the global generators as they were."""
        generators = _generators(self.device)
        # The user's generators are his: what layers draw must not move them, and a shuffle of his must not change a mask.
        states = [g.get_state() for g in generators]
        others = None if self.own is None else (random.getstate(), np.random.get_state())
        try:
            yield
        finally:
            for generator, state in zip(generators, states):
                generator.set_state(state)
            if others is not None:
                random.setstate(others[0])
                np.random.set_state(others[1])

    def set(self, layer: int, micro_batch: int) -> None:
        """Seed the generators for one layer (its index in the whole model) and one micro-batch."""
        if self.own is not None:
            self.own(layer, micro_batch)
            return
        seed = mix(self.base, self.replica, layer, micro_batch)
        for generator in _generators(self.device):
            generator.manual_seed(seed)
