"""What a run of the delay study is: what all of its runs share, what each has of its own, and the JSON that they come to."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import Any

from ds_decoupled.config import PRESETS
from ds_decoupled.errors import ConfigError

#: What the study's optimizers are in the JSON; ``lr`` is set by the run. Others go by their import path.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"type": "AdamW", "params": {"torch_adam": True, "weight_decay": 0.01}},
    "muon": {"type": "Muon", "params": {"torch_adam": True, "momentum": 0.95, "weight_decay": 0.01}},
    "nadam": {"type": "torch.optim.NAdam", "params": {"betas": [0.99, 0.999], "weight_decay": 0.01,
                                                      "decoupled_weight_decay": True}},
    "soap": {"type": "pytorch_optimizer.SOAP", "params": {"weight_decay": 0.01}},
}
#: DeepSpeed's Muon steps by sqrt(max(1, rows / columns)) in spectral norm; its rate over the AdamW half's, so that an update
#: of a matrix is about as large as AdamW's (0.2 sqrt(larger side), arXiv 2502.16982, for matrices of width 128).
MUON_OVER_ADAM = 2.3


@dataclass(frozen=True)
class Study:
    """What all runs of a study share.

    Attributes:
        data: as ``data.text.read_text`` takes it; every byte is a token, the last tenth is for validation.
        micro_batches: to train on.
        warmup: share of the updates over which the rate rises; then it falls by a cosine to 0.
        eval_micro_batches: to validate on.
        probe_every: micro-batches from one whose reconstruction is looked at to the next.
    """

    data: str
    micro_batches: int = 1500
    blocks: int = 4
    width: int = 128
    heads: int = 4
    sequence: int = 64
    micro_batch: int = 16
    warmup: float = 0.05
    eval_micro_batches: int = 50
    probe_every: int = 25

    def stage_bounds(self, stages: int) -> list[int]:
        """Layers at which J stages begin: the embedding joined to the first one's half-blocks, the head to the last one's.

        Two more stages than half-blocks: embedding and head are stages of their own.

        >>> Study("topics").stage_bounds(4), Study("topics").stage_bounds(10)
        ([0, 3, 5, 7, 10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
        """
        halves = 2 * self.blocks
        if stages == halves + 2:
            return list(range(stages + 1))
        if not 1 <= stages <= halves:
            raise ConfigError("--stages", stages, f"{self.blocks} blocks make 1 to {halves} stages, or {halves + 2} with "
                              "embedding and head as stages of their own")
        return [0, *(1 + round(halves * s / stages) for s in range(1, stages)), halves + 2]


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        method: a preset's name; ``backprop`` knows no stages, hops or ``lr_by_delay``.
        stages: J.
        hops: ticks from stage to stage, forward and backward.
        k: micro-batches an update.
        optimizer: a name of ``OPTIMIZERS`` or an import path.
        lr: peak; of Muon's AdamW half, the matrices' being ``MUON_OVER_ADAM`` times as large.
        embedding_std: scale of the streams at the start.
        lr_by_delay: as in the ``decoupled`` block.
        params: further parameters of the optimizer, as JSON text.
        block: further settings of the ``decoupled`` block, as JSON text.
        seed: of weights and data.
    """

    method: str
    stages: int
    hops: tuple[int, int]
    k: int
    optimizer: str
    lr: float
    embedding_std: float = 0.3
    lr_by_delay: int = 0
    params: str = "{}"
    seed: int = 0
    block: str = "{}"

    @property
    def delay(self) -> float:
        """Of the first stage, in updates, where the schedule has one; threads go as they go."""
        window = json.loads(self.block).get("window", PRESETS[self.method].window)
        above = min(window or self.stages, self.stages) - 1  # stages whose losses it waits for
        return sum(self.hops) * above / self.k if self.hops_matter else 0.0

    @property
    def flushes(self) -> bool:
        return self.method in ("backprop", "reversible")

    @property
    def hops_matter(self) -> bool:
        """Threads share all stages: nothing travels between these, and how late a gradient is, the run tells."""
        return not self.flushes and not PRESETS[self.method].layerwise

    @property
    def label(self) -> str:
        """For messages."""
        where = "" if self.method == "backprop" else f" J={self.stages}"
        where += f" hops={self.hops[0]},{self.hops[1]}" if self.hops_matter else ""
        more = f" lr_by_delay={self.lr_by_delay}" if self.lr_by_delay else ""
        more += "".join(f" {text}" for text in (self.params, self.block) if text != "{}")
        return (f"{self.method}{where} k={self.k} {self.optimizer} lr={self.lr:g} std={self.embedding_std:g}{more} "
                f"seed={self.seed}")

    def simplified(self) -> Setting:
        """Without what the method does not know, and with JSON spelt in one way, so that equal runs are equal."""
        params, block = (json.dumps(json.loads(text), separators=(",", ":"), sort_keys=True)
                         for text in (self.params, self.block))
        stages = 1 if self.method == "backprop" else self.stages
        found = replace(self, params=params, block="{}" if self.flushes else block, stages=stages)
        return found if self.hops_matter else replace(found, hops=(0, 1), lr_by_delay=0)

    def config(self, study: Study) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        optimizer = copy.deepcopy(OPTIMIZERS.get(self.optimizer, {"type": self.optimizer, "params": {}}))
        optimizer["params"]["lr"] = self.lr
        if self.optimizer == "muon":
            optimizer["params"]["muon_lr"] = MUON_OVER_ADAM * self.lr
        optimizer["params"].update(json.loads(self.params))
        block: dict[str, Any] = {"method": self.method}
        if self.method != "backprop":
            block["stages"] = study.stage_bounds(self.stages)
        if self.hops_matter:
            block |= {"hops": list(self.hops), "lr_by_delay": self.lr_by_delay}
        if not self.flushes:
            block |= json.loads(self.block)
        return {"train_micro_batch_size_per_gpu": study.micro_batch, "gradient_accumulation_steps": self.k,
                "gradient_clipping": 0.0, "steps_per_print": 10**9, "optimizer": optimizer, "decoupled": block}
