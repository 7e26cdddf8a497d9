"""A stage's optimizer as DeepSpeed wraps it: bf16 with float32 copies, ZeRO-1, or the bare one, stepped and kept alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import MUON_OPTIMIZER
from torch import Tensor
from torch.compiler import set_stance

from ds_decoupled.compat import PipelineEngineBase, norm_of_last_step


def reduce_and_step(engine: PipelineEngineBase, optimizer: Any, parameters: list[Any],
                    clip: Callable[[list[Any], float], Any] | None = None,
                    average: Callable[[list[Any]], None] | None = None) -> float | None:
    """Average the dense gradients over replicas, clip by this optimizer's own norm, step, and clear.

    Args:
        engine: whose settings apply.
        optimizer: DeepSpeed's wrapped optimizer.
        parameters: its parameters.
        clip: in the place of ``torch.nn.utils.clip_grad_norm_``.
        average: of the gradients of a bare optimizer's parameters over replicas, in the place of DeepSpeed's.

    Returns:
        The gradient norm before clipping, where it was computed.
    """
    # On CPU, compiling DeepSpeed's Muon takes 32 s of every process and then saves a fifth of its 7 ms a block of width 128.
    eager = engine.device.type == "cpu" and engine.optimizer_name() == MUON_OPTIMIZER
    with set_stance("force_eager") if eager else nullcontext():
        return _reduce_and_step(engine, optimizer, parameters, clip, average)


def _reduce_and_step(engine: PipelineEngineBase, optimizer: Any, parameters: list[Any],
                     clip: Callable[[list[Any], float], Any] | None,
                     average: Callable[[list[Any]], None] | None) -> float | None:
    norm: float | None = None
    if isinstance(optimizer, BF16_Optimizer):
        engine.allreduce_gradients_of(optimizer.get_grads_for_reduction()[0])
        optimizer.step()
        norm = norm_of_last_step(optimizer)
    elif hasattr(optimizer, "reduce_gradients"):  # ZeRO-1
        optimizer.set_gradient_accumulation_boundary(True)
        optimizer.reduce_gradients(pipeline_parallel=True)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.set_gradient_accumulation_boundary(False)
        norm = norm_of_last_step(optimizer)
    else:
        if average is not None:
            average(parameters)
        else:
            engine.allreduce_gradients_of([p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse])
        most = engine.gradient_clipping()
        if most > 0:
            norm = float((clip or torch.nn.utils.clip_grad_norm_)(parameters, most))
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
    return norm


def accumulate(optimizer: Any) -> None:
    """After a micro-batch's backward: where the optimizer accumulates in float32 (bf16), add and clear."""
    if isinstance(optimizer, BF16_Optimizer):
        optimizer.update_hp_grads(clear_lp_grads=False)
        optimizer.clear_lp_grads()


def accumulated(optimizer: Any, parameters: list[Any]) -> list[Tensor | None]:
    """The gradients accumulated so far, one per parameter; for a checkpoint in the middle of an accumulation."""
    if isinstance(optimizer, BF16_Optimizer):
        return list(optimizer.fp32_groups_gradients_flat)
    return [p.grad for p in parameters]


def restore_accumulated(optimizer: Any, parameters: list[Any], grads: list[Tensor | None]) -> None:
    """The inverse of :func:`accumulated`; whatever was accumulated before is gone."""
    if isinstance(optimizer, BF16_Optimizer):
        optimizer.clear_lp_grads(set_to_none=True)
        for index, (flat, saved) in enumerate(zip(optimizer.fp32_groups_gradients_flat, grads)):
            assert saved is not None
            flat.copy_(saved)
            # Norm and clipping look only at what is marked; what is zero adds nothing to either.
            optimizer.fp32_groups_has_gradients[index] = [bool(g.any()) for g in optimizer.fp32_groups_gradients[index]]
        return
    for parameter, grad in zip(parameters, grads):
        parameter.grad = None if grad is None else grad.to(parameter.device)


def drop_accumulated(optimizer: Any, parameters: list[Any]) -> None:
    """Forget what has been accumulated."""
    if isinstance(optimizer, BF16_Optimizer):
        optimizer.zero_grad()
    for parameter in parameters:
        parameter.grad = None


def refresh_masters(optimizer: Any) -> None:
    """The weights were replaced: where the optimizer keeps float32 copies of them, take those from the weights, or the next
    step would bring the old ones back."""
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()


def load_optimizer(optimizer: Any, state: Any, load_states: bool = True) -> None:
    """Load what ``optimizer.state_dict()`` gave on this rank: float32 copies of the weights always, moments and rates if
    ``load_states``."""
    if isinstance(optimizer, BF16_Optimizer) or hasattr(optimizer, "reduce_gradients"):
        rank = dist.get_rank(group=optimizer.dp_process_group)
        # Both index a list of all replicas' states by their own rank and need nothing of the others.
        states = [state if r == rank else None for r in range(dist.get_world_size(group=optimizer.dp_process_group))]
        # Without the last argument the copies keep the values that they have (bf16) or lose the bits that the weights lack.
        optimizer.load_state_dict(states, load_optimizer_states=load_states, load_from_fp32_weights=True)
    elif load_states:
        optimizer.load_state_dict(state)
