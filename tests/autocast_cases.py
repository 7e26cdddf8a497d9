"""What ranks run under ``torch_autocast``."""

from __future__ import annotations

from typing import Any

import torch
from engine_cases import build, data_of, state_of
from nets import batches


def learn(case: dict[str, Any]) -> dict[str, Any]:
    """Train and report; every layer notes in which precision its passes run."""
    engine = build(case)
    seen: set[Any] = set()
    for layer in engine.module.forward_funcs:
        layer.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    data = data_of(case, engine)
    if data is None and not hasattr(engine, "stages") and engine.is_last_stage():
        data = iter(batches(case["batches"]))
    losses = [engine.train_batch(data).item() for _ in range(case["batches"] // case.get("k", 1))]
    kept: list[torch.dtype] = []
    if hasattr(engine, "stages"):
        kept = [t.dtype for stage in engine.stages.values() for t in stage.kept() if t.ndim == 2 and t.shape[0] == t.shape[1]]
        engine.drain()
    engine.eval_batch(iter(batches(1)), num_micro_batches=1)
    return {"state": state_of(engine), "losses": losses, "seen": seen, "kept": len(kept), "replica": 0}


def learn_many(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several cases, one after the other."""
    return [learn(case) for case in cases]


def ambient(case: dict[str, Any]) -> list[str]:
    """What the calls say within a context of the user's own."""
    engine = build(case)
    data = data_of(case, engine)
    engine.train_batch(data)
    messages = []
    with torch.autocast("cpu", torch.bfloat16):
        for call in (lambda: engine.train_batch(data), lambda: engine.eval_batch(iter(batches(1)), num_micro_batches=1),
                     engine.drain):
            try:
                call()
                messages.append("")
            except RuntimeError as error:
                messages.append(str(error))
    engine.drain()
    return messages


def only_build(case: dict[str, Any]) -> None:
    build(case)
