"""How exact a rebuilt input is: a RevNet's couplings, and the walk back through any couplings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_decoupled.models.residual import BlockShape, basic_branch
from ds_decoupled.nn import ReversibleCoupling
from run.tables import table

Streams = tuple[Tensor, ...]


def reconstruction(channels: int, size: int, batch: int, blocks: int = 8) -> tuple[str, list[dict[str, Any]]]:
    """Relative error of the input rebuilt through 1 to ``blocks`` couplings, nothing having been updated, and of its gradient.

    Each is compared with what the forward pass saw at that depth; the gradient, with autograd's through the same couplings.
    """
    cases = [("float32", torch.float32, torch.float32, torch.float32),
             ("bf16, float32 streams", torch.bfloat16, torch.float32, torch.bfloat16),
             ("bf16, float32 streams that begin with full float32 values", torch.bfloat16, torch.float32, torch.float32),
             ("bf16, bf16 streams", torch.bfloat16, torch.bfloat16, torch.bfloat16)]
    shown = sorted({depth for depth in (1, 2, 4) if depth < blocks} | {blocks})
    found: list[dict[str, Any]] = []
    for name, weights, streams, entry in cases:
        torch.manual_seed(0)
        couplings = [ReversibleCoupling(basic_branch(BlockShape(channels, channels, 1), last_relu=True).to(weights),
                          stream_dtype=streams) for _ in range(blocks)]
        inputs = tuple(torch.randn(batch, channels, size, size).to(entry).to(streams) for _ in range(2))
        grads = tuple(torch.randn(batch, channels, size, size).to(streams) for _ in range(2))
        errors, gradient_error = walk_back(couplings, inputs, grads)
        found.append({"types": name, "input_errors": errors, "gradient_error": gradient_error})
    rows = [[str(row["types"]), *(f"{row['input_errors'][depth - 1]:.1e}" for depth in shown),
             f"{row['gradient_error']:.1e}"] for row in found]
    return table([f"{channels} channels, {size}x{size}, micro-batch {batch}", *(f"input rebuilt through {d}" for d in shown),
                  f"its gradient through {blocks}"], rows), found


def walk_back(couplings: Sequence[ReversibleCoupling], inputs: Streams, grads: Streams,
              by: Sequence[ReversibleCoupling] | None = None) -> tuple[list[float], float]:
    """Forward through ``couplings`` and back by reconstruction: errors of the inputs rebuilt through 1, 2, … of them, and of
    the gradient behind the last.

    Args:
        couplings: in the order of the forward pass.
        inputs: the first one's.
        grads: of the last one's outputs.
        by: what goes back, if not ``couplings`` themselves: the same with other weights.
    """
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    passed: list[Any] = [inputs]
    for coupling in couplings:
        passed.append(coupling(passed[-1]))
    wanted = torch.autograd.grad(passed[-1], inputs, grads)
    x: Any = tuple(y.detach() for y in passed.pop())
    dx: Any = grads
    errors = []
    for coupling in reversed(by if by is not None else couplings):
        x, dx = coupling.reverse(x, dx)
        errors.append(relative_error(x, passed.pop()))
    return errors, relative_error(dx, wanted)


def relative_error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """``|found - wanted| / |wanted|`` over all tensors together."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in itertools.zip_longest(found, wanted)]
    error = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    return float(error / torch.stack([b.norm() for _, b in pairs]).norm())
