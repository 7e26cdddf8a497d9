"""What a run of the AuxNet study is: a method, a number of stages, and settings of the ``auxnet`` object."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from typing import Any

from studies.image_settings import ImageStudy, sgd

METHODS = ("auxnet_penalty", "auxnet_lagrangian")
SWEPT = ("fit", "pull", "share")


@dataclass(frozen=True)
class AuxNetSetting:
    """One run.

    Attributes:
        method: ``backprop``, or of ``METHODS``.
        stages: K; 1 for ``backprop``.
        auxnet: settings of the object ``auxnet``, as JSON text.
        serial_epochs: the last so many are backpropagation through the serial network.
        seed: of weights and data.
    """

    method: str
    stages: int
    auxnet: str = "{}"
    serial_epochs: int = 0
    seed: int = 0

    @property
    def label(self) -> str:
        """For messages."""
        serial = f" then {self.serial_epochs} epochs serial" if self.serial_epochs else ""
        return f"{self.method} K={self.stages} {self.auxnet}{serial} seed={self.seed}"

    def config(self, study: ImageStudy, updates: int) -> dict[str, Any]:
        """The DeepSpeed JSON; the cosine to the exact gradient is taken about 25 times."""
        block: dict[str, Any] = {"method": self.method}
        if self.method != "backprop":
            auxnet = json.loads(self.auxnet)
            if self.serial_epochs:
                auxnet["serial_from"] = updates - self.serial_epochs * (updates // study.epochs)
            block |= {"stages": self.stages, "partition": "uniform", "track_gradients": max(1, updates // 25), "auxnet": auxnet}
        return {**sgd(study.micro_batch, study.lr), "decoupled": block}


def settings(methods: list[str], stages: list[int], given: dict[str, float], swept: dict[str, list[float]],
             serial: list[int], seeds: list[int]) -> list[AuxNetSetting]:
    """Every method at every number of stages with ``given``, and with one setting after the other replaced by each of its
    values in ``swept``, ``serial`` epochs at the end; beside them backpropagation."""
    objects = [given, *({**given, name: value} for name, values in swept.items() for value in values)]
    found = [AuxNetSetting("backprop", 1, seed=seed) for seed in seeds]
    found += [AuxNetSetting(method, count, json.dumps(auxnet, separators=(",", ":"), sort_keys=True), epochs, seed)
              for seed, method, count, auxnet, epochs in product(seeds, methods, stages, objects, serial)]
    return list(dict.fromkeys(found))
