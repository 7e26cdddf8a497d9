"""What a run of the fine-tuning study is: what all of its runs share, and the JSON that each comes to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ds_decoupled.config import PRESETS, DecoupledConfig, parse_block

WEIGHT_DECAY = 0.01
BARE = "bare"
"""A plain loop without an engine, in the place of a method's name."""


@dataclass(frozen=True)
class FinetuneStudy:
    """What all runs share.

    Attributes:
        model: a folder that ``save_pretrained`` wrote, or a hub name.
        data: as ``data.text.read_text`` takes it; the last tenth is for validation.
        updates: in all, those counted in which heads are taught.
        evaluate_every: updates from one validation to the next.
        sequence: tokens.
        micro_batch: sequences of an update.
        lr: of AdamW, the same in all updates.
        eval_micro_batches: to validate on.
    """

    model: str
    data: str
    updates: int = 100
    evaluate_every: int = 20
    sequence: int = 128
    micro_batch: int = 4
    lr: float = 5e-5
    eval_micro_batches: int = 8

    @property
    def ends(self) -> list[int]:
        """After which updates it is validated."""
        return [*range(self.evaluate_every, self.updates, self.evaluate_every), self.updates]


@dataclass(frozen=True)
class FinetuneSetting:
    """One run.

    Attributes:
        method: a preset's name, or :data:`BARE`, which has one stage as ``backprop`` has, which all are compared with.
        stages: J, each of as many layers as the others, those counted that its head is made of.
        block: further settings of the ``decoupled`` block, as JSON text.
        seed: of the data.
    """

    method: str
    stages: int = 1
    block: str = "{}"
    seed: int = 0

    @property
    def label(self) -> str:
        """For messages."""
        further = "" if self.block == "{}" else f" {self.block}"
        return f"{self.method} J={self.stages}{further} seed={self.seed}"

    def config(self, study: FinetuneStudy) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        block: dict[str, Any] = {"method": self.method, **json.loads(self.block)}
        if not PRESETS[self.method].flush:
            block = {"stages": self.stages, "partition": "uniform", **block}
        return {"train_micro_batch_size_per_gpu": study.micro_batch, "gradient_accumulation_steps": 1,
                "gradient_clipping": 1.0, "steps_per_print": 10**9,
                "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": study.lr, "weight_decay": WEIGHT_DECAY}},
                "decoupled": block}


def settings_of(methods: list[str], stages: list[int], blocks: list[str], seeds: list[int]) -> list[FinetuneSetting]:
    """Backpropagation first, then every combination of methods of the engine once, but for what is backpropagation by another
    name: the farthest loss of a window that reaches the top from everywhere."""
    found = []
    for seed in seeds:
        found.append(FinetuneSetting("backprop", seed=seed))
        found += [FinetuneSetting(method, count, block, seed) for method in methods for count in stages for block in blocks
                  if not _is_backprop(method, count, block)]
    return list(dict.fromkeys(found))


def _is_backprop(method: str, stages: int, block: str) -> bool:
    given = parse_block({"decoupled": {"method": method, **json.loads(block)}})
    return given is not None and given.losses == "farthest" and given.axes().window >= stages


def check(settings: list[FinetuneSetting], study: FinetuneStudy) -> list[DecoupledConfig]:
    """The blocks, read; raises ConfigError for what cannot work."""
    read = [parse_block(setting.config(study)) for setting in settings if setting.method != BARE]
    return [block for block in read if block is not None]
