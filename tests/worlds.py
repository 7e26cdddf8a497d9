"""Real processes for the tests: worlds of ranks, forked from a server that has imported everything once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from run.worlds import Parent, World, import_once
from run.worlds import WorldFailed as RankFailed
from run.worlds import free_port as free_port

import_once("preloaded")


def run(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """``fn(*args)`` on every rank of a new world; the results by rank.

    Raises:
        RankFailed: with every rank's error; all have until ``timeout`` to say theirs.
    """
    with World(world, _result, fn, args) as ranks:
        return ranks.answers(timeout, grace=timeout)


def _result(_: Parent, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return fn(*args)


__all__ = ["RankFailed", "free_port", "run"]
