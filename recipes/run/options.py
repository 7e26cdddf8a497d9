"""What numbers an option takes, and options that would change nothing: both are refused before anything is read or built."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from ds_decoupled.errors import ConfigError

COUNT = 10**9
"""The most of what is only counted; more is a slip of the finger."""
SEEDS = 2**32 - 1
"""Data orders draw from multiples of the seed, which must stay within torch's 64 bits."""


def whole(least: int, most: int = COUNT) -> Callable[[str], int]:
    """Reads a whole number from ``least`` to ``most``."""
    allowed = f"a whole number of at least {least}" + (f" and at most {most}" if most != COUNT else "")

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed if most != COUNT else f'{allowed} and at most {most}'}")
        return value

    return read


def number(least: float, most: float = math.inf, *, above: bool = False, below: bool = False) -> Callable[[str], float]:
    """Reads a finite number from ``least`` to ``most``; with ``above`` and ``below`` the bounds themselves are left out."""
    allowed = "a number " + (f"above {least:g}" if above else f"of at least {least:g}")
    if most < math.inf:
        allowed += f" and {'below' if below else 'at most'} {most:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        in_bounds = (value > least if above else value >= least) and (value < most if below else value <= most)
        if not in_bounds or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return read


def yes_or_no(text: str) -> bool:
    """Reads true or false, as TRL's command line has it."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a truth value: give true or false")
    return text.lower() == "true"


def refuse_unused(args: argparse.Namespace, names: Mapping[str, Any] | list[str], why: str, hint: str = "") -> None:
    """Refuse options that were given, though nothing would come of them.

    Args:
        names: of options whose default is None; or of others, with their defaults.
        why: they change nothing.
        hint: what to do.
    """
    defaults = names if isinstance(names, Mapping) else dict.fromkeys(names)
    for name, default in defaults.items():
        if (value := getattr(args, name)) != default:
            raise ConfigError(f"--{name}", value, f"it would change nothing: {why}", hint or "Leave it out")


def refuse_beyond_memory(option: str, value: Any, needed: float, what: str) -> None:
    """Refuse what no process of this machine can hold.

    Args:
        option, value: what makes it so large.
        needed: bytes.
        what: is held.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ConfigError(option, value, f"{what} would take {needed / 2**30:,.0f} GiB, and this machine has "
                          f"{memory / 2**30:,.0f} GiB", "Take less")
