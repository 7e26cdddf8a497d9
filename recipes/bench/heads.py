"""What heads of stage-local losses cost: multiply-adds of a forward pass, counted on tensors without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ds_decoupled.models import build_model
from ds_decoupled.nn import block_starts
from ds_decoupled.nn.auglocal import AUGLOCAL
from ds_decoupled.nn.heads import HEADS
from ds_decoupled.nn.reconstruction import RECONSTRUCT
from ds_decoupled.stages.heads import WholeModel, make_head
from ds_decoupled.tensors import Form, form_of
from run.tables import table

IMAGE_HEADS = (*(name for name in HEADS if name not in ("lm", RECONSTRUCT)), f"{AUGLOCAL}:2", AUGLOCAL)


def heads(name: str, width: int | None, image_size: int, micro_batch: int) -> tuple[str, list[dict[str, Any]]]:
    """Each head behind every block of a model but the last: a table, and the numbers by block."""
    found: list[dict[str, Any]] = []
    meta = torch.device("meta")
    with meta:
        specs = build_model(name, data="cifar10", width=width)
        ends = block_starts(specs)[1:]
        x: Any = torch.randn(micro_batch, 3, image_size, image_size)
        trunk, forms, given = 0, list[Form](), []
        for index, spec in enumerate(specs):
            if index in ends:
                given.append((trunk, x))
            cost, x = multiply_adds(spec.build(), x)
            trunk += cost
            forms.append(form_of(x))
        model = WholeModel(specs, [0, *ends, len(specs)], forms)
        for stage, (end, (so_far, x)) in enumerate(zip(ends, given)):
            costs = {head: multiply_adds(make_head(head, x, 10, 0, stage, None, meta, model), x)[0] for head in IMAGE_HEADS}
            found.append({"after_layer": end - 1, "trunk_so_far": so_far, **costs})
    rows = [[f"`{head}`", f"{sum(row[head] for row in found) / trunk:.2%}",
             " / ".join(f"{row[head] / trunk:.2%}" for row in found)] for head in IMAGE_HEADS]
    title = f"{name}, {image_size}x{image_size}, {trunk / micro_batch / 1e6:.0f} M multiply-adds a sample"
    return table([title, "all heads / trunk", "of each, from the lowest"], rows), found


def multiply_adds(module: nn.Module, x: Any) -> tuple[int, Any]:
    """Of a forward pass (a multiplication with its addition counts one), and what it gives."""
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    return counter.get_total_flops() // 2, y
