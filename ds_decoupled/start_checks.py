"""What can be checked only while the engine is built, told on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.moe.layer import MoE

from ds_decoupled.axes import Axes
from ds_decoupled.collectives import together
from ds_decoupled.compat import PipelineEngineBase
from ds_decoupled.errors import ConfigError
from ds_decoupled.optim import StageOptimizer
from ds_decoupled.optim.sparse import complaint, sparse_layers
from ds_decoupled.stages import Stage


def _raise(error: ConfigError | None) -> None:
    """On every rank, if there is one on any. A collective call."""
    def found() -> None:
        if error is not None:
            raise error

    together(found)


def has_expert_layers(module: Any) -> bool:
    """Whether a layer here is DeepSpeed's mixture of experts."""
    return any(isinstance(m, MoE) for m in module.modules())


def check_experts(module: Any) -> None:
    """Before DeepSpeed makes the groups of experts, which only the ranks that hold such a layer would join. A collective call.

    Raises:
        ConfigError: for ``deepspeed.moe`` on several ranks.
    """
    error = ConfigError("model", "deepspeed.moe.layer.MoE", "its experts are exchanged over groups of all ranks, and stages "
                        "that step on their own wait for nobody", "Take experts that live within a layer (a plain module), or "
                        '"method": "backprop", which is DeepSpeed\'s own engine.')
    _raise(error if torch.distributed.get_world_size() > 1 and has_expert_layers(module) else None)


def check_zero(config: Any, optimizer: Any) -> None:
    """Raises ConfigError for ZeRO without an optimizer, on every rank, before DeepSpeed asserts that there is one."""
    if config.zero_enabled and optimizer is None and config.optimizer_name is None:
        raise ConfigError("zero_optimization.stage", config.zero_optimization_stage, "it spreads an optimizer's state, and "
                          "there is no optimizer", 'Give an "optimizer" block, or leave "zero_optimization" out to '
                          "evaluate alone.")


def check_sparse(engine: PipelineEngineBase, stages: Mapping[int, Stage],
                 optimizers: Mapping[int, StageOptimizer]) -> None:
    """Layers with sparse gradients need an optimizer that takes them. A collective call.

    Raises:
        ConfigError: with bf16 or ZeRO, which keep gradients in flat buffers, and for optimizers that take dense ones alone.
    """
    error: ConfigError | None = None
    for index, stage in stages.items():
        # Only the first mistake is told: the same optimizer serves all stages, and one sentence is what a user can act on.
        layers = sparse_layers(stage.layers)
        optimizer = optimizers[index]
        if not layers or optimizer.optimizer is None or error is not None:
            continue
        name, hint = f"{layers[0]}(sparse=True)", "Leave sparse=True out"
        if engine.zero_optimization() or engine.bfloat16_enabled():
            error = ConfigError("model", name, "bf16 and ZeRO keep gradients in flat buffers, where sparse ones have no place",
                                f"{hint}, or train in float32 without ZeRO.")
        elif (said := complaint(optimizer.basic_optimizer)) is not None:
            error = ConfigError("model", name, f"{type(optimizer.basic_optimizer).__name__} does not take the sparse gradients "
                                f"that it gives ({said})", f"{hint}, or take SGD, Adagrad or torch.optim.SparseAdam.")
    _raise(error)


def check_loss(loss_fn: Any, stages: Mapping[int, Stage]) -> None:
    """Parameters of ``loss_fn`` are the last stage's, and no other stage's. A collective call.

    Raises:
        ConfigError: if it shares one with a layer of another stage.
    """
    error = None
    if isinstance(loss_fn, torch.nn.Module) and not all(stage.is_last for stage in stages.values()):
        own = {id(p) for p in loss_fn.parameters()}
        shared = [s for s, stage in stages.items() if not stage.is_last and own & {id(p) for p in stage.parameters}]
        if shared:
            error = ConfigError("loss_fn", type(loss_fn).__name__, f"it shares parameters with stage {shared[0]}, and the last "
                                "stage, which has the loss, steps at another time", "Give the loss parameters of its own.")
    _raise(error)


def check_reconstruct(any_reversible: bool, axes: Axes, layer_names: Sequence[Sequence[str]]) -> None:
    """``reconstruct`` with no layer that can be inverted is a mistake.

    Args:
        any_reversible: whether any stage of any rank has a layer that can be inverted.
        axes: the method.
        layer_names: the layers' types, by stage.

    Raises:
        ConfigError: naming the layers and what to take instead.
    """
    if axes.recover != "reconstruct" or any_reversible:
        return
    names = dict.fromkeys(name for stage in layer_names for name in stage)
    raise ConfigError("decoupled.recover", "reconstruct", f"no layer of this model can be inverted: {', '.join(names)}",
                      'Wrap residual functions in ds_decoupled.nn.ReversibleCoupling, give a layer an "inverse", '
                      'or take "recover": "input" (method "dsp")')
