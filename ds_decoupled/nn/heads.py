"""Heads for stage-local losses: small networks from a stage's output to what the loss takes.

For images, with C channels at H × H (decoupled greedy learning, arXiv 2106.06401):

===========  ==================================================================================================
``mlp-sr``   pool to ⌈H/4⌉, 3 × (1×1 convolution C→C, BN, ReLU), pool to 2×2, 3 × (linear 4C→4C, BN, ReLU), linear
``mlp``      the same without the convolutions
``cnn``      2 × (3×3 convolution, BN, ReLU) at full resolution, pool to 2×2, linear
``linear``   pool to 2×2, linear
===========  ==================================================================================================

``mlp`` and ``linear`` also take feature vectors ``(N, features)``, as they are.

For language models ``lm``: RMSNorm and an unembedding; ``reconstruct`` asks for the stage's input back
(:mod:`ds_decoupled.nn.reconstruction`). For any model ``last-layer``: a copy of the model's own last layer, with the weights
that this starts from; ``last-layers:3``: of the last three, so that extra blocks stand before an unembedding; ``auglocal``: of
a few layers picked evenly from those above the stage, and of the last one (:mod:`ds_decoupled.nn.auglocal`); ``lens``: a
translator, such copies, and the last layer as it is (:mod:`ds_decoupled.nn.lens`).

Where a stage gives two streams (a reversible one), a head sees their sum; where it gives ``(hidden, mask, ...)``, the hidden
state. A copy of the last layer sees all that the stage gives.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_decoupled.errors import ConfigError
from ds_decoupled.nn.auglocal import AUGLOCAL
from ds_decoupled.nn.lens import LENS
from ds_decoupled.nn.reconstruction import RECONSTRUCT, reconstruction

HeadBuilder = Callable[[torch.Size, int], nn.Module]
"""From the shape of the stage's output (with the batch) and the number of outputs to a head."""


def _linear_block(width: int) -> list[nn.Module]:
    return [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]


def _conv_block(channels: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True)]


def _image(shape: torch.Size, name: str) -> tuple[int, int]:
    """Channels and height of ``(N, C, H, W)``. Raises :class:`ConfigError` for another shape."""
    if len(shape) != 4:
        raise ConfigError("decoupled.head", name, f"this head takes images (N, C, H, W); the stage gives {tuple(shape)}",
                          "Take 'lm' for token sequences, 'mlp' for feature vectors, or a head of your own "
                          "('module:callable').")
    return shape[1], shape[2]


def mlp_sr(shape: torch.Size, outputs: int) -> nn.Module:
    """MLP with spatial reduction, the recommended head."""
    channels, height = _image(shape, "mlp-sr")
    convolutions = [layer for _ in range(3) for layer in _conv_block(channels, 1)]
    return nn.Sequential(nn.AdaptiveAvgPool2d(math.ceil(height / 4)), *convolutions, *_mlp(channels, outputs))


def mlp(shape: torch.Size, outputs: int) -> nn.Module:
    """Pool to 2×2, three hidden layers; feature vectors go into these as they are."""
    if len(shape) == 2:
        return nn.Sequential(*(layer for _ in range(3) for layer in _linear_block(shape[1])), nn.Linear(shape[1], outputs))
    channels, _ = _image(shape, "mlp")
    return nn.Sequential(*_mlp(channels, outputs))


def _mlp(channels: int, outputs: int) -> list[nn.Module]:
    width = 4 * channels
    hidden = [layer for _ in range(3) for layer in _linear_block(width)]
    return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), *hidden, nn.Linear(width, outputs)]


def cnn(shape: torch.Size, outputs: int) -> nn.Module:
    """Two convolutions at full resolution."""
    channels, _ = _image(shape, "cnn")
    convolutions = [layer for _ in range(2) for layer in _conv_block(channels, 3)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, outputs))


def linear(shape: torch.Size, outputs: int) -> nn.Module:
    """Pool to 2×2, one linear layer; feature vectors go into it as they are."""
    if len(shape) == 2:
        return nn.Linear(shape[1], outputs)
    channels, _ = _image(shape, "linear")
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, outputs))


def language_model(shape: torch.Size, outputs: int) -> nn.Module:
    """RMSNorm and an unembedding; ``(N, T, width)`` to ``(N, T, outputs)``."""
    if len(shape) != 3:
        raise ConfigError("decoupled.head", "lm", f"it takes hidden states (N, T, width); the stage gives {tuple(shape)}",
                          "Take 'mlp-sr' for images, or a head of your own ('module:callable').")
    unembedding = nn.Linear(shape[2], outputs, bias=False)
    nn.init.normal_(unembedding.weight, std=0.02)
    return nn.Sequential(nn.RMSNorm(shape[2]), unembedding)


HEADS: dict[str, HeadBuilder] = {"mlp-sr": mlp_sr, "mlp": mlp, "cnn": cnn, "linear": linear, "lm": language_model,
                                RECONSTRUCT: reconstruction}


LAST_LAYER = "last-layer"
"""A copy of the model's own last layer; ``last-layers:3`` of the last three, one after the other."""


def copied_layers(name: str | HeadBuilder) -> int:
    """How many of the model's last layers the head copies; 0 for a head of another kind.

    >>> copied_layers("last-layer"), copied_layers("last-layers:3"), copied_layers("lm")
    (1, 3, 0)

    Raises:
        ConfigError: if the number is none.
    """
    if not isinstance(name, str) or not name.startswith(LAST_LAYER):
        return 0
    kind, colon, count = name.partition(":")
    if not colon and kind == LAST_LAYER:
        return 1
    if kind != f"{LAST_LAYER}s" or not count.isdigit() or not int(count):
        raise ConfigError("decoupled.head", name, "copies of the model's last layers are named 'last-layer' or 'last-layers:n'",
                          "For example 'last-layers:3'.")
    return int(count)


SHARED = "shared"
"""A read-only copy of the last stage's last layer; ``shared:2`` behind trainable copies of the two layers before it."""


def shared_blocks(name: str | HeadBuilder | None) -> int | None:
    """How many layers of its own a head has before the shared readout; None for a head of another kind.

    >>> shared_blocks("shared"), shared_blocks("shared:2"), shared_blocks("lm")
    (0, 2, None)

    Raises:
        ConfigError: if the number is none.
    """
    if not isinstance(name, str) or not name.startswith(SHARED):
        return None
    kind, colon, count = name.partition(":")
    if kind != SHARED or colon and not count.isdigit():
        raise ConfigError("decoupled.head", name, "shared heads are named 'shared', or 'shared:n' with n layers before the "
                          "readout", "For example 'shared:2'.")
    return int(count or 0)


class SharedReadout(nn.Module):
    """A read-only copy of a layer: it passes gradients on and learns nothing; that of shared heads is refreshed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> SharedReadout:
        """It is in evaluation mode always."""
        # Batch norm and dropout of a copy that learns nothing would only add noise to what its stage learns from.
        super().train(False)
        return self

    def forward(self, x: Any) -> Tensor:
        logits: Tensor = self.layer(x)
        return logits


class StageHead(nn.Module):
    """A head on whatever a stage gives.

    Args:
        head: takes one tensor, or all that the stage gives.
        takes_all: which of the two.
    """

    def __init__(self, head: nn.Module, takes_all: bool = False) -> None:
        super().__init__()
        self.head, self.takes_all = head, takes_all

    def forward(self, outputs: Tensor | Sequence[Tensor]) -> Tensor:
        logits: Tensor = self.head(outputs if self.takes_all else one_tensor(outputs))
        return logits


def one_tensor(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """What a head sees: the tensor, the sum of two streams, or the first of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    first = outputs[0]
    # Two tensors of one shape are a reversible layer's streams, whose sum is what its model's own head reads.
    if len(outputs) == 2 and outputs[1].shape == first.shape and outputs[1].is_floating_point():
        return first + outputs[1]
    return first


def build_head(name: str | HeadBuilder, outputs: Any, count: int) -> StageHead:
    """A head for stages that give what ``outputs`` shows.

    Args:
        name: of :data:`HEADS`, ``"module:callable"``, or a callable of ``(shape, count)``.
        outputs: what the stage gives for a micro-batch (tensors may be on the meta device).
        count: outputs of the head: classes, or tokens of the vocabulary.

    Raises:
        ConfigError: if there is no such head, or it cannot be built from the shape.
    """
    builder = _find(name) if isinstance(name, str) else name
    shape = one_tensor(outputs).shape
    try:
        return StageHead(builder(shape, count))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError("decoupled.head", str(name), f"it cannot be built from the shape {tuple(shape)} "
                          f"({type(error).__name__}: {error})", "Take another head, or cut the stages elsewhere.") from error


def _find(name: str) -> HeadBuilder:
    if name in HEADS:
        return HEADS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        named = ", ".join(map(repr, (*HEADS, LAST_LAYER, SHARED, AUGLOCAL, LENS)))
        raise ConfigError("decoupled.head", name, f"heads are {named}",
                          "A head of your own is named 'module:callable'.")
    try:
        found: HeadBuilder = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError("decoupled.head", name, f"it cannot be imported ({error})",
                          "Is the module on PYTHONPATH?") from error
    return found


def add_up(votes: Sequence[Tensor]) -> list[Tensor]:
    """Several tensors as one; none as none."""
    return [torch.stack(list(votes)).sum(dim=0)] if votes else []


def ensemble(votes: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Logits of the mean of all heads' probabilities.

    Args:
        votes: probabilities, or sums of them, of the heads below.
        logits: of the last stage, ``(..., classes)``.
    """
    total = torch.stack([logits.float().softmax(dim=-1), *votes]).sum(dim=0)
    return (total / total.sum(dim=-1, keepdim=True)).log().to(logits.dtype)
