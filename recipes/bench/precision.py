"""How exact a reversible GPT's inputs come back, against its depth, the streams' type, and the weights' age."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.reconstruction import walk_back
from ds_decoupled.models import GPTConfig, build_gpt, next_token_loss
from run.tables import table

DEPTHS = (4, 8, 16, 32)

STEPS = 40
"""Updates of the trained ones: the weights that write to a stream begin near zero."""

LEARNING_RATE = 1e-3


class Types(NamedTuple):
    """What is kept in which precision."""

    label: str
    weights: torch.dtype
    streams: torch.dtype


TYPES = (Types("float32", torch.float32, torch.float32), Types("bf16, float32 streams", torch.bfloat16, torch.float32),
         Types("bf16, bf16 streams", torch.bfloat16, torch.bfloat16))


def precision(micro_batch: int, length: int, width: int, depths: Sequence[int] = DEPTHS) -> tuple[str, list[dict[str, Any]]]:
    """Relative errors of the rebuilt input of the first coupling and of its gradient: a table, and the numbers.

    For every depth a GPT as it begins and one trained for ``STEPS`` updates on an arithmetic of tokens; rebuilt with the same
    weights and, beside rounding, with weights one update newer.
    """
    found: list[dict[str, Any]] = []
    for blocks in tqdm(depths, unit="depth"):
        torch.manual_seed(0)
        gpt = nn.Sequential(*(spec.build() for spec in build_gpt(GPTConfig(blocks=blocks, width=width, heads=4))))
        optimizer = torch.optim.AdamW(gpt.parameters(), lr=LEARNING_RATE)
        ids = _token_arithmetic(micro_batch, length)
        for steps in (0, STEPS):
            for _ in range(steps):
                _update(gpt, optimizer, ids)
            newer, its_optimizer = copy.deepcopy((gpt, optimizer))
            _update(newer, its_optimizer, ids)
            for types in TYPES:
                found.append({"blocks": blocks, "steps": steps, "types": types.label, **_errors(gpt, newer, types, ids)})
    rows = [[str(row["types"]), str(row["steps"]), str(row["blocks"]),
             *(f"{row[name]:.1e}" for name in ("input_error", "gradient_error", "newer_error"))] for row in found]
    return table(["types", "updates before", "blocks", "input rebuilt", "its gradient",
                  "input rebuilt, weights one update newer"], rows), found


def _token_arithmetic(micro_batch: int, length: int) -> Tensor:
    """Sequences in which every token is five times the last plus a constant of the sequence: something to learn."""
    ids = torch.randint(256, (micro_batch, 1))
    constants = torch.randint(256, (micro_batch,))
    for _ in range(length):
        ids = torch.cat([ids, ((5 * ids[:, -1] + constants) % 256)[:, None]], dim=1)
    return ids


def _update(gpt: nn.Sequential, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    optimizer.zero_grad()
    next_token_loss(gpt(ids[:, :-1]), ids[:, 1:]).backward()
    optimizer.step()


def _errors(gpt: nn.Sequential, newer: nn.Sequential, types: Types, ids: Tensor) -> dict[str, float]:
    """Of the couplings between embedding and head, in ``types``."""
    couplings, its = _couplings(gpt, types), _couplings(newer, types)
    with torch.no_grad():
        # In the streams' type, so that their gradient is not rounded to the embedding's.
        embedded = tuple(x.to(types.streams) for x in copy.deepcopy(gpt[0]).to(types.weights)(ids[:, :-1]))
    grads = tuple(torch.randn(x.shape).to(types.streams) for x in embedded)
    inputs, gradient = walk_back(couplings, embedded, grads)
    return {"input_error": inputs[-1], "gradient_error": gradient,
            "newer_error": walk_back(couplings, embedded, grads, its)[0][-1]}


def _couplings(gpt: nn.Sequential, types: Types) -> list[Any]:
    couplings: list[Any] = copy.deepcopy(list(gpt)[1:-1])
    for coupling in couplings:
        coupling.to(types.weights).stream_dtype = types.streams
    return couplings
