"""What a run of the image study is: what all of its runs share, and the ``decoupled`` block that each has of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from typing import Any

#: Of the paper's CNN, a stage each; the classifier belongs to the last.
J = 6


@dataclass(frozen=True)
class ImageTask:
    """What all runs of a study on images share.

    Attributes:
        data: as ``data.images.load_images`` takes it.
        model: as ``ds_decoupled.models.build_model`` takes it.
        images: of these, the first so many are trained on; 0 for all.
        width: of the model; that of the paper's six-layer CNN is 128.
        image_size: pixels a side.
        epochs: that each stage trains for, by its own count.
        micro_batch: images.
    """

    data: str
    model: str = "cnn6"
    images: int = 0
    width: int = 16
    image_size: int = 16
    epochs: int = 6
    micro_batch: int = 64


@dataclass(frozen=True)
class ImageStudy(ImageTask):
    """Where all runs have one learning rate.

    Attributes:
        lr: peak; a cosine by each stage's own updates leads to 0.
    """

    lr: float = 0.05


@dataclass(frozen=True)
class ImageSetting:
    """One run.

    Attributes:
        line: the curve that it is a point of.
        x: where on that curve; None for a run that stands beside them.
        block: settings of the ``decoupled`` block, as JSON text.
        seed: of weights, data and clock.
    """

    line: str
    x: float | None
    block: str
    seed: int = 0

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.line} {self.block} seed={self.seed}"

    def config(self, study: ImageStudy, updates: int) -> dict[str, Any]:
        """The DeepSpeed JSON; stages that go at their own pace stop after ``updates`` of their own."""
        block = json.loads(self.block)
        if block["method"] != "backprop":
            block = {"stages": "blocks", "head": "mlp", **block}
        if block["method"] == "dgl_async":
            block = {"pace": "clock", "stop_after": [updates] * J, "clock": {"seed": self.seed}, **block}
        return {**sgd(study.micro_batch, study.lr), "decoupled": block}


def sgd(micro_batch: int, lr: float) -> dict[str, Any]:
    """What every run's JSON says of batches and the optimizer."""
    return {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0, "steps_per_print": 10**9,
            "optimizer": {"type": "SGD", "params": {"lr": lr, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}}}


def _text(**block: Any) -> str:
    return json.dumps(block, separators=(",", ":"), sort_keys=True)


def delays(slow: list[float], sizes: list[int], stages: list[int], seeds: list[int]) -> list[ImageSetting]:
    """The paper's simulated delays (arXiv 2106.06401): one stage slowed by S at a time, rings of M; beside them the
    synchronous method and backpropagation."""
    found = [ImageSetting(method, None, _text(method=method), seed) for method in ("backprop", "dgl") for seed in seeds]
    for seed, size, factor, stage in product(seeds, sizes, slow, stages):
        slow_down = [factor if s == stage else 1.0 for s in range(J)]
        block: dict[str, Any] = {"method": "dgl_async", "replay": {"size": size}}
        if factor > 1:
            block["slow_down"] = slow_down
        found.append(ImageSetting(f"M = {size}", factor, _text(**block), seed))
    return list(dict.fromkeys(found))


#: What activations travel by and are kept as: a name, and settings of the block.
CODECS: dict[str, dict[str, Any]] = {
    "none": {},
    "bf16": {"codec": "bf16"},
    "fp8": {"codec": "fp8"},
    "int8": {"codec": "int8"},
    "int4": {"codec": "int4"},
    "int4-rotated": {"codec": "int4-rotated"},
    "vq 8x (D = 2)": {"codec": "vq", "vq": {"group": 2, "codebook": 256}},
    "vq 16x (D = 4)": {"codec": "vq", "vq": {"group": 4, "codebook": 256}},
    "residual vq 16x (D = 4, K = 16, 2 levels)": {"codec": "vq", "vq": {"group": 4, "codebook": 16, "levels": 2}},
    "vq 32x (D = 8)": {"codec": "vq", "vq": {"group": 8, "codebook": 256}},
    "vq 64x (D = 16)": {"codec": "vq", "vq": {"group": 16, "codebook": 256}},
    "residual vq 16x (D = 8, 2 levels)": {"codec": "vq", "vq": {"group": 8, "codebook": 256, "levels": 2}},
    "residual vq 32x (D = 16, 2 levels)": {"codec": "vq", "vq": {"group": 16, "codebook": 256, "levels": 2}},
}


def compression(codecs: list[str], size: int, slow: float, seeds: list[int]) -> list[ImageSetting]:
    """Every codec on every link, for synchronous greedy learning and for the asynchronous one (rings of ``size``, the third
    stage slowed by ``slow``)."""
    found = []
    for seed, name in product(seeds, codecs):
        chosen = dict(CODECS[name])
        codec = {"codec": {"forward": chosen.pop("codec"), "every_link": True}} if chosen else {}
        ring = {"replay": {"size": size}, "slow_down": [slow if s == 2 else 1.0 for s in range(J)]}
        found += [ImageSetting(f"dgl, {name}", None, _text(method="dgl", **codec, **chosen), seed),
                  ImageSetting(f"dgl_async, {name}", None, _text(method="dgl_async", **ring, **codec, **chosen), seed)]
    return found
