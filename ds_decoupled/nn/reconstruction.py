"""The head of LoPT (arXiv 2605.04913): a lower stage of a language model is asked for its own input back, and for nothing else.

::

    stage's output (N, T, d)  ->  LayerNorm, linear d -> d/4, GELU, linear d/4 -> d   against the stage's input, detached
    loss = 10 * mean squared error;  the last stage alone learns the task

The input of the first stage is token ids, and what counts in their place is what its first layer makes of them: the
embeddings. Both linear layers start from Xavier's uniform with gain 0.1, so that the stage is pulled at gently while the head
knows nothing.

No label reaches a lower stage. Under Adam, which divides by a gradient's size, the factor 10 changes nothing, and lower stages
drift at the full rate towards what is easily rebuilt: give them a small one (``stage_lr``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_decoupled.errors import ConfigError

RECONSTRUCT = "reconstruct"
"""The head's name."""

FACTOR = 10.0
"""Of the mean squared error."""


def reconstruction(shape: torch.Size, outputs: int) -> nn.Module:
    """``(N, T, d)`` to the same shape; ``outputs``, the number of tokens, says nothing here.

    Raises:
        ConfigError: for another shape.
    """
    if len(shape) != 3:
        raise ConfigError("decoupled.head", RECONSTRUCT, f"it takes hidden states (N, T, width); the stage gives "
                          f"{tuple(shape)}",
                          "It is for language models; take 'auglocal' or 'mlp-sr' for images.")
    width = shape[2]
    down, up = nn.Linear(width, max(1, width // 4)), nn.Linear(max(1, width // 4), width)
    for linear in (down, up):
        nn.init.xavier_uniform_(linear.weight, gain=0.1)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.LayerNorm(width), down, nn.GELU(), up)


def reconstruction_loss(rebuilt: Tensor, features: Tensor) -> Tensor:
    """``10 * mean squared error``, in float32.

    Raises:
        ValueError: if the two differ in shape: stages of a model whose width changes have nothing to rebuild.
    """
    if rebuilt.shape != features.shape:
        raise ValueError(f"the head {RECONSTRUCT!r} rebuilds a stage's input from its output, and their shapes differ: "
                         f"{tuple(features.shape)} and {tuple(rebuilt.shape)}")
    return FACTOR * nn.functional.mse_loss(rebuilt.float(), features.float())
