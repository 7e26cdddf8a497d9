"""Random numbers that depend on the layer and the micro-batch alone.

Dropout must draw the same mask when a forward pass is run again, and the same mask wherever the stage is placed. So no
generator state is kept: every layer of every micro-batch has a seed of its own, and the global generators are left as
they were found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


@dataclass(frozen=True)
class LayerSeeds:
    """Seeds of the layers of one replica.

    Attributes:
        base: the run's seed.
        replica: the data-parallel rank, so that replicas draw different masks.
        device: the device whose generator is seeded beside the CPU's.
    """

    base: int
    replica: int
    device: torch.device

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Leave the global generators as they were."""
        generators = _generators(self.device)
        states = [g.get_state() for g in generators]
        try:
            yield
        finally:
            for generator, state in zip(generators, states):
                generator.set_state(state)

    def set(self, layer: int, micro_batch: int) -> None:
        """Seed the generators for one layer (its index in the whole model) and one micro-batch."""
        seed = mix(self.base, self.replica, layer, micro_batch)
        for generator in _generators(self.device):
            generator.manual_seed(seed)
