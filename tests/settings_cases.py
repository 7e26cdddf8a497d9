"""What ranks do in ``test_settings.py``."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import engine_cases
import torch
from torch import nn

from ds_decoupled.collectives import agreed, together
from ds_decoupled.errors import ConfigError, RankError


def told(case: dict[str, Any], of_rank: dict[int, dict[str, Any]]) -> str:
    """The first line of what this rank raises when it builds ``case``, with ``of_rank``'s differences; a collective call."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else int(__import__("os").environ["RANK"])
    try:
        engine_cases.build({**case, **of_rank.get(rank, {})})
    except (ConfigError, RankError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "nothing"


def many(cases: list[tuple[dict[str, Any], dict[int, dict[str, Any]]]]) -> list[str]:
    """One case after the other, in one world: each must fail cleanly, or the next would not run."""
    return [told(*case) for case in cases]


def of_one_rank() -> list[str]:
    """How an error of rank 1 alone is told here: a setting's, and any other."""
    import deepspeed

    deepspeed.init_distributed()
    rank = torch.distributed.get_rank()

    def setting() -> int:
        if rank == 1:
            raise ConfigError("colour", lambda: 0, "red or blue", "Take one.")
        return 1

    def other() -> int:
        if rank == 1:
            raise MemoryError("no room")
        return 1

    def different() -> tuple[int, dict[str, Any]]:
        return 1, {"same": [1, 2.0], "colour": "red" if rank == 0 else None}

    found = []
    for action in (lambda: together(setting), lambda: together(other), lambda: agreed(different, "paint")):
        try:
            found.append(repr(action()))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return [*found, repr(together(lambda: 5))]


def still_stage(case: dict[str, Any], stage: int) -> dict[str, Any]:
    """Whether the weights of ``stage`` and of the others moved, and where the schedulers are."""
    engine = engine_cases.build(case)
    before = {s: [p.detach().clone() for p in part.parameters] for s, part in engine.stages.items()}
    data = engine_cases.data_of(case, engine)
    for _ in range(case["batches"]):
        engine.train_batch(data)
    engine.drain()
    moved = {s: any(not torch.equal(a, b) for a, b in zip(before[s], part.parameters)) for s, part in engine.stages.items()}
    return {"moved": moved, "lr": {s: o.optimizer.param_groups[0]["lr"] for s, o in engine.stage_optimizers.items()},
            "updates": {s: o.updates for s, o in engine.stage_optimizers.items()}}


def breakdown(case: dict[str, Any]) -> tuple[str, list[dict[str, float]]]:
    """What is printed, and the summary's seconds."""
    engine = engine_cases.build(case)
    data, out = engine_cases.data_of(case, engine), io.StringIO()
    with contextlib.redirect_stdout(out):
        for _ in range(case["batches"]):
            engine.train_batch(data)
    engine.drain()
    return out.getvalue(), engine.decoupled_summary()["seconds_by_action"]


def fail_in_a_layer(rank: int, partition: str) -> str:
    """A layer that only one rank cannot build."""
    import os

    from deepspeed.pipe import LayerSpec
    from nets import plain_net

    import ds_decoupled

    class Bad(nn.Identity):
        def __init__(self) -> None:
            super().__init__()
            if int(os.environ["RANK"]) == rank:
                raise MemoryError("no room")

    config = engine_cases.config_of({"method": "delayed", "stages": 2, "block": {"partition": partition}})
    try:
        ds_decoupled.DecoupledPipelineModule([LayerSpec(Bad), *plain_net(), LayerSpec(Bad)], config=config,
                                             loss_fn=nn.MSELoss())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def settings_read(case: dict[str, Any]) -> set[str]:
    """The settings of the block that are looked at by what builds, trains and evaluates; those that check it do not count."""
    import sys

    from ds_decoupled.config import DecoupledConfig

    seen: set[str] = set()
    checks = ("pydantic", "ds_decoupled/settings", "ds_decoupled/entry.py")
    plain = DecoupledConfig.__getattribute__

    def look(self: DecoupledConfig, name: str) -> Any:
        caller = sys._getframe(1).f_code
        checking = caller.co_name == "_resolve" or any(part in caller.co_filename for part in checks)
        if name in DecoupledConfig.model_fields and not checking:
            seen.add(name)
        return plain(self, name)

    DecoupledConfig.__getattribute__ = look  # type: ignore[method-assign]
    try:
        engine = engine_cases.build(case)
        data = engine_cases.data_of(case, engine)
        if data is None and case["method"] == "backprop":  # DeepSpeed's own engine reads on the last rank too
            data = engine_cases.data_of(case, type("First", (), {"is_first_stage": lambda self: True, "mpu": engine.mpu})())
        for _ in range(case["batches"]):
            engine.train_batch(data)
        if hasattr(engine, "drain"):
            engine.drain()
            engine.eval_batch(engine_cases.data_of(case, engine), num_micro_batches=1)
            engine.decoupled_summary()
    finally:
        DecoupledConfig.__getattribute__ = plain  # type: ignore[method-assign]
    return seen


def all_settings_read(cases: list[dict[str, Any]]) -> list[set[str]]:
    return [settings_read(case) for case in cases]
