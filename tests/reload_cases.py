"""What ranks run to load a checkpoint into an engine that has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engine_cases import build, data_of, state_of
from torch import Tensor


def _everything(engine: Any) -> dict[str, Tensor]:
    """Weights, and what optimizers hold of this rank's stages."""
    state = state_of(engine)

    def note(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            state[name] = value.detach().clone()
        elif isinstance(value, (int, float)):
            state[name] = torch.tensor(float(value))
        elif isinstance(value, dict):
            for key, part in value.items():
                note(f"{name}.{key}", part)
        elif isinstance(value, (list, tuple)):
            for key, part in enumerate(value):
                note(f"{name}.{key}", part)

    for index, stage in engine.stage_optimizers.items():
        note(f"optimizer {index}", stage.state_dict())
        state[f"lr {index}"] = torch.tensor(stage.basic_optimizer.param_groups[0]["lr"])
    return state


def again(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train ``stop`` calls, save, train on; load, and train on with the same data: what the second way differs in."""
    torch.manual_seed(0)
    engine = build(case)
    k, calls = case.get("k", 1), case["batches"] // case.get("k", 1)

    def train_on() -> tuple[list[float], dict[str, Tensor]]:
        data = data_of(case, engine)
        for _ in range(case["stop"] * k if data else 0):
            next(data)
        losses = [engine.train_batch(data).item() for _ in range(calls - case["stop"])]
        found = _everything(engine)
        losses.append(engine.drain().item())
        return losses, {**found, **{f"drained {name}": value for name, value in _everything(engine).items()}}

    data = data_of(case, engine)
    for _ in range(case["stop"]):
        engine.train_batch(data)
    engine.save_checkpoint(folder)
    losses, first = train_on()
    if case.get("in_flight"):  # the engine then holds another run's micro-batches
        data = data_of(case, engine)
        for _ in range(3):
            engine.train_batch(data)
    engine.load_checkpoint(folder)
    again, second = train_on()
    differ = [name for name, value in first.items() if not torch.equal(value, second[name])]
    same = [a == b or (a != a and b != b) for a, b in zip(losses, again)]
    return {"differ": differ, "names": first.keys() == second.keys(), "losses": all(same), "count": len(first)}


def all_again(cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Several cases, one after the other."""
    return [again(case, f"{folder}/{i}") for i, case in enumerate(cases)]


def weights_alone(case: dict[str, Any], folder: str, **options: Any) -> dict[str, Any]:
    """Load weights alone, or without the optimizers' states, after some training; then an update at learning rate 0."""
    engine = build(case)
    data = data_of(case, engine)
    for _ in range(2):
        engine.train_batch(data)
    engine.drain()
    engine.save_checkpoint(folder)
    saved = state_of(engine)
    for _ in range(3):
        engine.train_batch(data)
    message = ""
    if options.get("load_module_only"):
        try:
            engine.load_checkpoint(folder, **options)
        except RuntimeError as error:
            message = str(error)
    engine.drain()
    moved = [name for name, value in state_of(engine).items() if not torch.equal(value, saved[name])]
    engine.load_checkpoint(folder, **options)
    loaded = state_of(engine)
    for stage in engine.stage_optimizers.values():  # nothing may move them but a rate
        stage.lr_scheduler = None
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.train_batch(data)
    engine.drain()
    after = state_of(engine)
    still = {name: torch.equal(loaded[name], saved[name]) and torch.equal(after[name], saved[name]) for name in saved}
    return {"message": message, "moved": moved, "still": still}


def all_weights_alone(cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Several cases, each with and without optimizers' states."""
    ways: list[dict[str, Any]] = [{"load_module_only": True}, {"load_optimizer_states": False}]
    return [weights_alone(case, f"{folder}/{i}-{j}", **way) for i, case in enumerate(cases) for j, way in enumerate(ways)]


def incomplete(case: dict[str, Any], folder: str) -> str:
    """A file of the topmost rank's is gone; what loading says."""
    engine = build(case)
    engine.save_checkpoint(folder, tag="a")
    if engine.is_last_stage():
        next(Path(folder, "a").glob(f"decoupled_stage_{max(engine.stages):02d}-*")).unlink()
    try:
        engine.load_checkpoint(folder)
    except Exception as error:
        return str(error)
    return ""


def other_folders(case: dict[str, Any], folder: str) -> str:
    """Every rank looks into a folder of its own, and only the first one's has a checkpoint."""
    engine = build(case)
    engine.save_checkpoint(folder, tag="a")
    try:
        engine.load_checkpoint(folder if engine.global_rank == 0 else f"{folder}/elsewhere")
    except Exception as error:
        return str(error)
    return ""
