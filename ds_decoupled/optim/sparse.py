"""Sparse gradients, as ``nn.Embedding(sparse=True)`` gives them: averaging, clipping, and which optimizers take them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_decoupled.optim.client import twin
from ds_decoupled.optim.groups import settings_of


def sparse_layers(modules: Iterable[Any]) -> list[str]:
    """The types of layers that give sparse gradients."""
    found = [m for layer in modules if isinstance(layer, nn.Module) for m in layer.modules()
             if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse and m.weight.requires_grad]
    return [type(m).__name__ for m in found]


def complaint(optimizer: Any) -> str | None:
    """What ``optimizer`` says to a sparse gradient, found out on a parameter of its own; None where it takes one."""
    for group in optimizer.param_groups:
        parameter = nn.Parameter(torch.zeros(2, 2))
        parameter.grad = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 2), (2, 2),
                                                 check_invariants=False)
        tried = twin(optimizer, [{**settings_of(group), "params": [parameter]}])
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(tried, hooks, OrderedDict())  # the user's hooks are not to see this
        try:
            tried.step()
        except Exception as error:
            return str(error)
    return None


def average(parameters: Sequence[nn.Parameter], group: Any) -> None:
    """Average the sparse gradients of ``parameters`` over ``group``, in their place: the rows of all replicas, padded to one
    length, because no backend reduces sparse tensors everywhere."""
    world = dist.get_world_size(group)
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        grad = grad.coalesce()
        count = torch.tensor([grad._nnz()], device=grad.device)
        counts = [torch.empty_like(count) for _ in range(world)]
        dist.all_gather(counts, count, group=group)
        longest = max(int(c) for c in counts)
        indices, values = (_gathered(part, longest, world, group) for part in (grad.indices().t(), grad.values()))
        rows = [torch.cat([part[:int(c)] for part, c in zip(parts, counts)]) for parts in (indices, values)]
        parameter.grad = torch.sparse_coo_tensor(rows[0].t(), rows[1] / world, grad.shape, check_invariants=False).coalesce()


def _gathered(part: Tensor, length: int, world: int, group: Any) -> list[Tensor]:
    padded = part.new_zeros(length, *part.shape[1:])
    padded[:len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return parts


def clip(parameters: Iterable[nn.Parameter], most: float) -> float:
    """``torch.nn.utils.clip_grad_norm_``, which takes dense gradients alone, for gradients of both kinds.

    Returns:
        The norm before clipping.
    """
    tensors = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # a row that comes twice counts as its sum
            tensors.append(parameter.grad._values())
        elif parameter.grad is not None:
            tensors.append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(tensors)
    scale = torch.clamp(most / (norm + 1e-6), max=1.0)
    for tensor in tensors:
        tensor.mul_(scale)
    return float(norm)
