"""An optimizer in the hands of several threads at once: each steps with gradients of its own on the same weights and state.

As in the paper (PD-ASGD, arXiv 2410.05985) and in Hogwild nobody waits: of two updates of one stage at the same moment a part
may be lost.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_decoupled.errors import ConfigError
from ds_decoupled.optim.stage_optimizer import StageOptimizer


def check_lock_free(optimizer: StageOptimizer) -> None:
    """Raises :class:`ConfigError` for an optimizer whose state is not all in ``state``, by parameter."""
    wrapped, basic = optimizer.optimizer, optimizer.basic_optimizer
    if wrapped is not None and (wrapped is not basic or not type(basic).__module__.startswith("torch.optim")):
        raise ConfigError("decoupled.threads.lock", "none", f"{type(wrapped).__name__} keeps numbers that "
                          "several threads cannot write at once",
                          'Take an optimizer of torch.optim in float32 without ZeRO, or "lock": "layer".')


class Hand:
    """One thread's hold on a stage's optimizer.

    Args:
        optimizer: the stage's, which has made a step: what it keeps beside the weights is there.
    """

    def __init__(self, optimizer: StageOptimizer) -> None:
        self.of = optimizer
        basic: Optimizer = optimizer.basic_optimizer
        self._twins: dict[nn.Parameter, nn.Parameter] = {}
        for group in basic.param_groups:
            for p in group["params"]:
                self._twins[p] = nn.Parameter(p.data, requires_grad=p.requires_grad)  # the same memory, another .grad
        self._own = copy.copy(basic)
        self._own.param_groups = [{**group, "params": [self._twins[p] for p in group["params"]]}
                                  for group in basic.param_groups]
        # The very dicts: what one thread writes there all find.
        self._own.state = defaultdict(dict, {twin: basic.state[p] for p, twin in self._twins.items()})

    def step(self, gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """One update, clipped and scheduled as the stage's own are; :meth:`StageOptimizer.stepped` counts it.

        Args:
            gradients: by the stage's parameters.
        """
        divisor, most = self.of.lr_divisor(self.of.updates), self.of.engine.gradient_clipping()
        for own, group in zip(self._own.param_groups, self.of.basic_optimizer.param_groups):
            own.update({name: value for name, value in group.items() if name != "params"})
            own["lr"] = group["lr"] / divisor  # the rate of now
        for p, grad in gradients:
            twin = self._twins[p]
            if twin.data_ptr() != p.data_ptr():
                twin.data = p.data
            twin.grad = grad
        if most > 0:
            torch.nn.utils.clip_grad_norm_(list(self._twins.values()), most)
        self._own.step()
        for twin in self._twins.values():
            twin.grad = None
