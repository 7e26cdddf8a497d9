"""What the benchmark trains: image models on random pictures, GPTs on random tokens; all data lie in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_decoupled.models import MODELS, SIZES, GPTConfig, build_gpt, build_model, next_token_loss

GPTS = tuple(f"{family}-{size}" for family in ("gpt", "plain-gpt") for size in SIZES)
NAMES = (*MODELS, *GPTS)
"""What ``--model`` takes: ``gpt-*`` are reversible, ``plain-gpt-*`` are not."""

_POOL = 4  # micro-batches that come round again and again


class Model(Protocol):
    """What every configuration of a run trains.

    Attributes:
        micro_batch: samples in one.
        streams: whether two tensors travel between its layers; then every layer between the first and the last is reversible
            or keeps its input.
    """

    @property
    def micro_batch(self) -> int: ...

    @property
    def streams(self) -> bool: ...

    def specs(self) -> list[LayerSpec]:
        """The layers."""

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches without end."""

    def loss(self) -> Callable[[Any, Any], Tensor]:
        """The loss function."""

    def describe(self) -> str:
        """What stands above a table."""


@dataclass(frozen=True)
class ImageModel:
    """A RevNet or a ResNet on square pictures."""

    name: str
    width: int
    image_size: int
    micro_batch: int

    @property
    def streams(self) -> bool:
        return self.name.startswith("revnet")

    def specs(self) -> list[LayerSpec]:
        return build_model(self.name, data="cifar10", width=self.width)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.micro_batch, 3, self.image_size, self.image_size)
        pool = [(torch.randn(shape, generator=generator), torch.randint(10, (self.micro_batch,), generator=generator))
                for _ in range(_POOL)]
        return itertools.cycle(pool)

    def loss(self) -> Callable[[Any, Any], Tensor]:
        return nn.CrossEntropyLoss()

    def describe(self) -> str:
        return (f"{self.name} at width {self.width}, {self.image_size} x {self.image_size} images, "
                f"micro-batch {self.micro_batch}")


@dataclass(frozen=True)
class LanguageModel:
    """A GPT on sequences of ``length`` tokens."""

    name: str
    config: GPTConfig
    length: int
    micro_batch: int

    @property
    def streams(self) -> bool:
        return not self.name.startswith("plain")

    def specs(self) -> list[LayerSpec]:
        return build_gpt(self.config, reversible=self.streams)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        shape = (_POOL, self.micro_batch, self.length + 1)
        pool = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
                for ids in torch.randint(self.config.vocab_size, shape, generator=generator)]
        return itertools.cycle(pool)

    def loss(self) -> Callable[[Any, Any], Tensor]:
        return next_token_loss

    def describe(self) -> str:
        c = self.config
        return (f"{self.name}: {c.blocks} blocks of width {c.width}, {c.heads} heads, {c.vocab_size} tokens; sequences of "
                f"{self.length}, micro-batch {self.micro_batch}")


def make_model(name: str, micro_batch: int, *, width: int | None = None, image_size: int = 22, length: int = 128,
               blocks: int | None = None) -> ImageModel | LanguageModel:
    """A model by its name.

    Args:
        name: one of ``NAMES``.
        micro_batch: samples.
        width: of an image model's first group (default: 64) or of a GPT (default: its size's).
        image_size: pixels a side.
        length: tokens of a sequence.
        blocks: a GPT's depth (default: its size's).
    """
    if name in MODELS:
        return ImageModel(name, width or 64, image_size, micro_batch)
    config = SIZES[name.rsplit("-", 1)[1]]
    config = replace(config, width=width or config.width, blocks=blocks or config.blocks)
    return LanguageModel(name, config, length, micro_batch)
