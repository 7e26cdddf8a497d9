"""What the rank of a layer-wise world does in the tests."""

from __future__ import annotations

from typing import Any

import engine_cases

from ds_decoupled.errors import ConfigError


def stopped_and_not(cases: list[dict[str, Any]], folder: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each case trained in one go, and stopped and resumed."""
    found = []
    for i, case in enumerate(cases):
        whole = engine_cases.train(case)
        engine_cases.train_and_stop(case, f"{folder}/{i}")
        found.append((whole, engine_cases.resume(case, f"{folder}/{i}")))
    return found


def refused(case: dict[str, Any]) -> str:
    """What building the engine says."""
    try:
        engine_cases.build(case)
    except ConfigError as error:
        return str(error)
    return "nothing"


def replicas(case: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Two replicas on the clock; what threads say to two pipe ranks."""
    return engine_cases.train(case), refused({**case, "block": {"threads": {}}, "pipe_ranks": 2})
