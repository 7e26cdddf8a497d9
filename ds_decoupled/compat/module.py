"""What this package takes of a ``PipelineModule`` that has no public name."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from deepspeed.pipe import PipelineModule

from ds_decoupled.collectives import gather, together, wait_for_all
from ds_decoupled.errors import ConfigError


class PipelineModuleBase(PipelineModule):
    """A ``PipelineModule`` whose ranks begin at the layers that :meth:`rank_layer_bounds` says."""

    def rank_layer_bounds(self) -> list[int]:
        """P+1 layer indices; called once, when specs and topology are known and nothing is built."""
        raise NotImplementedError

    def _partition_layers(self, method: str = "uniform") -> None:
        wait_for_all()  # the grid has made its groups
        self.parts = together(self.rank_layer_bounds)
        rank = self.pipe_rank
        self._set_bounds(start=self.parts[rank], stop=self.parts[rank + 1])

    def _build(self) -> None:
        together(super()._build)  # a layer that cannot be built is one rank's alone

    @property
    def pipe_rank(self) -> int:
        """This process's place on the pipe axis."""
        return int(self._topo.get_coord(self.global_rank).pipe)


def layer_specs(module: PipelineModule) -> list[Any]:
    """What the whole model is made of, built or not."""
    return list(module._layer_specs)


def layer_parameters(module: PipelineModule) -> list[float]:
    """Trainable parameters of every layer of the whole model before it is built, counted without memory where the layers allow
    it; no random number is used up."""
    with torch.random.fork_rng():
        try:
            with torch.device("meta"):
                counts = module._count_layer_params()
        except (RuntimeError, NotImplementedError, ValueError):  # a layer that looks at its own values while it is built
            counts = module._count_layer_params()
    return [float(n) for n in counts]


def built_parameters(module: PipelineModule) -> list[float]:
    """Trainable parameters of every layer of the whole model once it is built, each counted on its rank; a collective call."""
    counts = [0.0] * len(module._layer_specs)
    for index, function in enumerate(module.forward_funcs, module._local_start):
        # A tied layer with a forward_fn is partial(forward_fn, layer).
        layer = function.args[0] if isinstance(function, partial) and function.args else function
        if isinstance(layer, torch.nn.Module):
            counts[index] = float(sum(p.numel() for p in layer.parameters() if p.requires_grad))
    return [max(layer) for layer in zip(*gather(counts))]


def hooks_of(module: PipelineModule) -> list[int]:
    """The ids of the hooks on the module itself, not on its layers."""
    kinds = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return [key for hooks in kinds for key in hooks]


def check_runs_by_layers(module: PipelineModule) -> None:
    """Stages call a module's layers one by one: what else it does when it is called would not happen.

    Raises:
        ConfigError: for a ``forward`` of its own, or hooks on the module itself.
    """
    if getattr(module.forward, "__func__", None) is not PipelineModule.forward:
        raise ConfigError("model", type(module).__name__, "it has a forward() of its own, and stages call its layers one by "
                          "one", "Put what it does into a layer.")
    if hooks_of(module):
        raise ConfigError("model", type(module).__name__, "it has hooks, and stages call its layers one by one, never the "
                          "module", "Register them on a layer.")
