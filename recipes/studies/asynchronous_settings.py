"""What a run of the asynchronous study is: what all of its runs share, and the JSON that each comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from studies.image_settings import ImageTask, sgd

REPLICAS = 2


@dataclass(frozen=True)
class Way:
    """A way to use two cores.

    Attributes:
        block: the ``decoupled`` block.
        replicas: processes that share the data, a core each.
        waits: whether replicas wait for one another.
        split_operations: whether torch's own threads share every operation; else each thread has whole ones.
    """

    block: dict[str, Any]
    replicas: int = 1
    waits: bool = False
    split_operations: bool = False


def _threads(stages: int | str, **threads: Any) -> Way:
    return Way({"method": "pd_asgd", "stages": stages, "threads": threads})


WAYS: dict[str, Way] = {
    "backprop": Way({"method": "backprop"}, split_operations=True),
    "pd_asgd 1:1": _threads("blocks", forward=1, backward=1),
    "pd_asgd 1:2": _threads("blocks", forward=1, backward=2),
    "pd_asgd 1:2, whole": _threads(1, forward=1, backward=2),
    "hogwild": _threads(1, workers=2, lock="none"),
    "hogwild, layers": _threads("blocks", workers=2, lock="none"),
    "synchronous": Way({"method": "backprop"}, REPLICAS, waits=True),
    "allreduce": Way({"method": "pd_asgd", "stages": "blocks", "exchange": "allreduce"}, REPLICAS, waits=True),
    "average": Way({"method": "lapsgd", "stages": 1, "exchange": "average"}, REPLICAS),
    "gossip": Way({"method": "pd_asgd", "stages": "blocks", "exchange": "gossip"}, REPLICAS),
}
"""By name. ``synchronous`` is DeepSpeed's own data parallelism, ``average`` LAPSGD, ``gossip`` LayUp."""


@dataclass(frozen=True)
class AsynchronousStudy(ImageTask):
    """What all runs share; epochs are of all replicas together.

    Attributes:
        evaluations: on the way, at equal distances.
        test_images: of these, the first so many are looked at on the way.
    """

    width: int = 32
    epochs: int = 8
    evaluations: int = 16
    test_images: int = 2000


@dataclass(frozen=True)
class AsynchronousSetting:
    """One run.

    Attributes:
        way: of :data:`WAYS`.
        rate: peak; a cosine by each replica's own updates leads to 0.
        delay: d, batch times by which every batch of the second replica takes longer.
        seed: of weights and data.
    """

    way: str
    rate: float
    delay: float = 0.0
    seed: int = 0

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.way} lr={self.rate:g} d={self.delay:g} seed={self.seed}"

    @property
    def replicas(self) -> int:
        """Processes."""
        return WAYS[self.way].replicas

    def config(self, study: ImageTask, updates: int) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        return {**sgd(study.micro_batch, self.rate), "decoupled": dict(WAYS[self.way].block)}

    def shares(self, micro_batches: int) -> list[int]:
        """Micro-batches of each replica: as many as one gets done while the other does its own.

        >>> AsynchronousSetting("gossip", 0.1, 1.0).shares(600), AsynchronousSetting("allreduce", 0.1, 1.0).shares(600)
        ([400, 200], [300, 300])
        """
        way = WAYS[self.way]
        if way.replicas == 1:
            return [micro_batches]
        speed = 1.0 if way.waits else 1 + self.delay
        first = round(micro_batches * speed / (1 + speed))
        return [first, micro_batches - first]


def law(delay: float, replicas: int = REPLICAS) -> float:
    """Speed of replicas that do not wait, over that of replicas that do: ``(P(1+d) - d) / P``.

    >>> law(0.0), law(4.0)
    (1.0, 3.0)
    """
    return (replicas * (1 + delay) - delay) / replicas
