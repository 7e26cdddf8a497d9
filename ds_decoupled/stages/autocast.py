"""``torch_autocast``, DeepSpeed's block for ``torch.autocast``: the same in every pass of a micro-batch, whenever it runs.

As in DeepSpeed's pipeline engine the layers run in it and ``loss_fn`` does not; a forward pass that runs again does, a backward
pass does not, as torch recommends. A context of the user's own around ``train_batch`` would hold for some passes of a
micro-batch and not for others, and is refused.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ds_decoupled.compat import PipelineEngineBase
from ds_decoupled.errors import ConfigError

_HINT = 'Take "torch_autocast": {"enabled": true, "dtype": "bfloat16"} in the configuration'


@dataclass(frozen=True)
class Autocast:
    """How layers run.

    Attributes:
        device: where tensors live.
        dtype: of what autocast lowers; None where it is off.
    """

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype | None = None

    def forward(self) -> AbstractContextManager[Any]:
        """The context of a forward pass. Casts of weights are not remembered: within a context that lasts over an update, torch
        would go on with those of the old ones."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)


def autocast_of(engine: PipelineEngineBase, graphs_outlive_updates: bool, compiled: bool) -> Autocast:
    """What the configuration says.

    Raises:
        ConfigError: for float16, whose loss scale stages do not agree on, and for compiled graphs that would keep cast weights.
    """
    if not engine.torch_autocast_enabled():
        return Autocast(engine.device)
    dtype = engine.torch_autocast_dtype()
    if dtype == torch.float16:
        raise ConfigError("torch_autocast.dtype", "float16", "it needs a loss scale, and stages that step on their own agree "
                          "on none", 'Take "bfloat16".')
    if compiled and graphs_outlive_updates:
        raise ConfigError("torch_autocast.enabled", True, "compiled graphs keep the cast weights of their forward pass, where "
                          "this method goes back with the current ones", 'Leave "compile" out, or take a method that runs the '
                          'forward pass again, such as "dsp".')
    return Autocast(engine.device, dtype)


def refuse_ambient(device: torch.device, call: str) -> None:
    """Raises RuntimeError within a ``torch.autocast`` of the user's."""
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError(f"torch.autocast around {call}() is refused: a micro-batch's passes run in several calls, and this "
                           f"context holds for one. {_HINT}, which holds for all passes, and take the context away.")
