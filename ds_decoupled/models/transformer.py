"""Two GPTs of the same sizes as lists of layers for a pipeline: a reversible one of constant width, and a plain residual one.

::

    reversible   ids  ->  (x1, x2)                        both streams are the token's embedding
                 attention   (x1, x2) -> (x2 + Attn(norm(x1)), x1)
                 MLP         (x1, x2) -> (x2 + MLP(norm(x1)), x1)
                 head        (x1, x2) -> logits of norm(x1 + x2)
    plain        ids -> x,  x + Attn(norm(x)),  x + MLP(norm(x)),  logits of norm(x)

Each half-block is a layer of its own, so that a stage may end between them. Between the embedding and the head a reversible
GPT keeps nothing for micro-batches in flight; the embedding keeps token ids. RMSNorm, rotary positions (arXiv 2104.09864),
torch's own ``scaled_dot_product_attention``, no biases, embedding and head not tied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.nn import functional as F

from ds_decoupled.errors import ConfigError
from ds_decoupled.nn import ReversibleCoupling, mark_block

Streams = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT.

    Attributes:
        blocks: pairs of attention and MLP.
        width: of the (each) stream.
        heads: of attention; must divide the width into even parts.
        vocab_size: tokens.
        dropout: of attention weights and of what a half-block adds.
        embedding_std: of the embedding's initial values. The larger the stream is against what a block adds, the smaller
            is the error of an input rebuilt with newer weights.
    """

    blocks: int
    width: int
    heads: int
    vocab_size: int = 256
    dropout: float = 0.0
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError("heads", self.heads, f"rotary positions need width / heads to be an even whole number; width is "
                              f"{self.width}", "Take another number of heads.")

    @property
    def initial_std(self) -> float:
        """Of the weights that write to a stream, as in GPT-2: smaller the more of them there are."""
        return 0.02 / math.sqrt(2 * self.blocks)


#: Sizes by name; small and medium are GPT-2's.
SIZES = {
    "tiny": GPTConfig(blocks=4, width=128, heads=4),
    "small": GPTConfig(blocks=12, width=768, heads=12, vocab_size=50257),
    "medium": GPTConfig(blocks=24, width=1024, heads=16, vocab_size=50257),
}


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=std)
    return linear


def rotary(x: Tensor) -> Tensor:
    """Rotate pairs of features by their position; ``x``: ``(N, heads, T, features)``, positions along T."""
    length, features = x.shape[-2:]
    exponents = torch.arange(0, features, 2, device=x.device, dtype=torch.float32) / features
    angles = torch.outer(torch.arange(length, device=x.device, dtype=torch.float32), 10000.0**-exponents)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    """``Attn(norm(x))``, causal; ``(N, T, width)`` to the same shape."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.norm = nn.RMSNorm(config.width)
        self.qkv = _linear(config.width, 3 * config.width, 0.02)
        self.out = _linear(config.width, config.width, config.initial_std)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = (part.view(n, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.drop(self.out(y.transpose(1, 2).reshape(n, length, width)))


class MLP(nn.Module):
    """``MLP(norm(x))``, four times as wide inside, GELU; ``(N, T, width)`` to the same shape."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width)
        self.up = _linear(config.width, 4 * config.width, 0.02)
        self.down = _linear(4 * config.width, config.width, config.initial_std)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class ReversibleAttention(ReversibleCoupling):
    """``(x1, x2) -> (x2 + Attn(norm(x1)), x1)``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(Attention(config))


class ReversibleMLP(ReversibleCoupling):
    """``(x1, x2) -> (x2 + MLP(norm(x1)), x1)``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(MLP(config))


class Residual(nn.Module):
    """``x + f(x)``: a half-block of the plain GPT."""

    def __init__(self, config: GPTConfig, kind: type[Attention] | type[MLP]) -> None:
        super().__init__()
        self.f = kind(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class TokenEmbedding(nn.Module):
    """Ids ``(N, T)`` to vectors ``(N, T, width)``; twice the same for two streams."""

    def __init__(self, config: GPTConfig, streams: int) -> None:
        super().__init__()
        self.streams = streams
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)

    def forward(self, ids: Tensor) -> Tensor | Streams:
        x = self.embedding(ids)
        # A clone: the two streams go different ways, and a layer may write into one of them.
        return (x, x.clone()) if self.streams == 2 else x


class LanguageModelHead(nn.Module):
    """Logits ``(N, T, vocab_size)`` of the norm of the stream, or of the sum of both."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width)
        self.unembedding = _linear(config.width, config.vocab_size, 0.02)

    def forward(self, x: Tensor | Streams) -> Tensor:
        joined = x[0] + x[1] if isinstance(x, tuple) else x
        return self.unembedding(self.norm(joined.to(self.norm.weight.dtype)))


def next_token_loss(logits: Tensor, targets: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy in nats; ``logits (N, T, vocab_size)``, ``targets (N, T)`` with -100 where none is asked for.

    With ``(targets, tokens)``, ``tokens (1,)``, the sum is divided by ``tokens`` instead of by the targets that are asked for:
    where micro-batches of an update have different numbers of them, their mean lets all tokens weigh the same.

    Targets stand at the place that they are predicted at, shifted already: for inputs ``ids[:, :-1]`` they are ``ids[:, 1:]``.
    (``transformers`` takes labels that are the inputs, and shifts them itself.)
    """
    # float: a softmax over a large vocabulary loses most of its bits in bf16.
    if isinstance(targets, tuple | list):
        targets, tokens = targets
        return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="sum") / tokens.squeeze()
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def build_gpt(config: GPTConfig | str, reversible: bool = True) -> list[LayerSpec]:
    """A GPT as layer specs, each marked as the start of a block: embedding, two per block, head: J = 2 blocks + 2.

    Args:
        config: sizes, or a name of ``SIZES``.
        reversible: two streams and couplings, or one stream with residual half-blocks.
    """
    if isinstance(config, str):
        if config not in SIZES:
            raise ConfigError("model", config, f"choose one of {', '.join(SIZES)}")
        config = SIZES[config]
    layers = [LayerSpec(TokenEmbedding, config, 2 if reversible else 1)]
    for _ in range(config.blocks):
        if reversible:
            layers += [LayerSpec(ReversibleAttention, config), LayerSpec(ReversibleMLP, config)]
        else:
            layers += [LayerSpec(Residual, config, Attention), LayerSpec(Residual, config, MLP)]
    layers.append(LayerSpec(LanguageModelHead, config))
    return [mark_block(layer) for layer in layers]
