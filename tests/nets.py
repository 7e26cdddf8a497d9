"""Small networks for the tests."""

from __future__ import annotations

import time
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_decoupled.models import GPTConfig, build_gpt, from_hugging_face
from ds_decoupled.nn import ReversibleCoupling, mark_block

CLASSES = 3


class ConvResidual(nn.Module):
    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.norm(self.conv(x))))


class Coupling(ReversibleCoupling):
    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__(ConvResidual(channels, dropout))


class Stem(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2 * channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(2 * channels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(self.conv.weight.dtype)
        return tuple(torch.relu(self.norm(self.conv(x))).chunk(2, 1))


class Down(nn.Module):
    """Not reversible: halves the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x1, x2 = (x.to(self.conv.weight.dtype) for x in streams)
        return self.conv(x1), nn.functional.avg_pool2d(x2, 2)


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, CLASSES)

    def forward(self, streams: tuple[Tensor, ...]) -> Tensor:
        x = torch.cat(streams, 1).mean((2, 3))
        return self.linear(x.to(self.linear.weight.dtype))


class Affine(nn.Module):
    """Undone by an inverse of its own, without a fused backward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1))

    def forward(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return streams[0] * self.scale, streams[1] / self.scale

    def inverse(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return streams[0] / self.scale, streams[1] * self.scale


class ConvBlock(nn.Module):
    """A plain layer: tensor to tensor, works on its input in place."""

    def __init__(self, inputs: int, outputs: int, in_place: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.ReLU(inplace=True) if in_place else nn.Identity()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        # The factor keeps tanh's own output out of reach of a next layer that works in place.
        return self.dropout(torch.tanh(self.norm(self.conv(self.first(x))))) * 1.5


class Pool(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def reversible_net(channels: int = 4, dropout: float = 0.0, affine: bool = False) -> list[Any]:
    """Stem, two couplings, a downsampling, two couplings, head: seven layers."""
    couplings = [LayerSpec(Coupling, channels, dropout) for _ in range(4)]
    if affine:
        couplings[1] = LayerSpec(Affine, channels)
    layers = [LayerSpec(Stem, channels), *couplings[:2], LayerSpec(Down, channels), *couplings[2:], LayerSpec(Head, channels)]
    return [mark_block(layer) for layer in layers]


def plain_net(channels: int = 4, in_place: bool = True, dropout: float = 0.0) -> list[Any]:
    """Six layers, none of which can be undone; some work on their input in place."""
    return [LayerSpec(ConvBlock, 2, channels), LayerSpec(ConvBlock, channels, channels, in_place, dropout),
            LayerSpec(ConvBlock, channels, channels, False, dropout), LayerSpec(ConvBlock, channels, channels, in_place),
            LayerSpec(ConvBlock, channels, channels), LayerSpec(Pool, channels)]


def batches(count: int, size: int = 4, seed: int = 0, replica: int = 0, replicas: int = 1) -> list[tuple[Tensor, Tensor]]:
    """``count`` micro-batches of 8x8 pictures; replica r gets its share of batches of ``size * replicas``."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        x = torch.randn(size * replicas, 2, 8, 8, generator=generator)
        y = torch.randint(0, CLASSES, (size * replicas,), generator=generator)
        made.append((x[replica * size:(replica + 1) * size], y[replica * size:(replica + 1) * size]))
    return made


NETS = {"reversible": reversible_net, "plain": plain_net}


class LinearResidual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.norm(x)))


class LinearCoupling(ReversibleCoupling):
    def __init__(self, width: int) -> None:
        super().__init__(LinearResidual(width))


class Flatten(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 2 * width)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.linear(x.flatten(1).to(self.linear.weight.dtype)).chunk(2, 1))


class Classify(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, CLASSES)

    def forward(self, streams: tuple[Tensor, ...]) -> Tensor:
        return self.linear(torch.cat(streams, 1).to(self.linear.weight.dtype))


def norm_free_net(width: int = 16, couplings: int = 4) -> list[Any]:
    """Linear couplings with layer norm: nothing depends on the rest of the batch."""
    layers = [LayerSpec(Flatten, width), *(LayerSpec(LinearCoupling, width) for _ in range(couplings)),
              LayerSpec(Classify, width)]
    return [mark_block(layer) for layer in layers]


NETS["norm_free"] = norm_free_net


def gpt_net(reversible: bool = True, dropout: float = 0.0) -> list[Any]:
    """A GPT of two blocks, width 16: six layers."""
    return build_gpt(GPTConfig(blocks=2, width=16, heads=2, vocab_size=11, dropout=dropout), reversible)


NETS["gpt"] = gpt_net


def llama_net(blocks: int = 6) -> list[Any]:
    """A Llama of ``transformers``, as a pretrained one is given: embedding, blocks, and a readout with weights of its own."""
    from tiny_lm import tiny_config
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return from_hugging_face(AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=blocks, vocab_size=11)).eval())


NETS["llama"] = llama_net
TEXT = ("gpt", "llama")


def token_batches(count: int, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """``count`` micro-batches of ids and next ids, ``(size, 6)``."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, 11, (count, size, 7), generator=generator)
    return [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in made]


def batches_for(net: str, *args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches that the net takes."""
    return (token_batches if net in TEXT else batches)(*args, **kwargs)


def varied(made: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches cut to many shapes: fewer samples, shorter sequences, narrower pictures."""
    cut = []
    for m, (x, y) in enumerate(made):
        samples, length = len(x) - m % 3, x.shape[-1] - m % 4 * (1 if x.dim() == 2 else 2)  # the downsampling halves pictures
        inputs = x[:samples, :length] if x.dim() == 2 else x[:samples, ..., :length]
        labels = y[:samples, :length] if y.dim() == 2 else y[:samples]
        cut.append((inputs.contiguous(), labels.contiguous()))
    return cut


class SlowHead(nn.Module):
    """Takes 20 ms."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(outputs)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return self.linear(x.flatten(1))


def slow_head(shape: torch.Size, outputs: int) -> nn.Module:
    """A head by its name, ``nets:slow_head``."""
    return SlowHead(outputs)
