"""Tables of results in Markdown, and what stands above them: the machine, the versions, the command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

MIB = 2**20


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = [list(head), ["---", *("---:" for _ in head[1:])], *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment() -> dict[str, Any]:
    """Date, machine, versions, command."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"date": datetime.date.today().isoformat(), "cores": cores, "cpu": cpu, "memory_gib": round(memory, 1),
            "python": platform.python_version(), "torch": version("torch"), "deepspeed": version("deepspeed"),
            "command": shlex.join(["python", *sys.argv])}


def headline(facts: Mapping[str, Any], what: str) -> str:
    """What stands above a table."""
    return (f"{what}\n\n{facts['date']}, {facts['cores']} cores of {facts['cpu']}, {facts['memory_gib']} GiB, "
            f"Python {facts['python']}, torch {facts['torch']}, DeepSpeed {facts['deepspeed']}, one thread a rank.\n\n"
            f"    {facts['command']}\n")
