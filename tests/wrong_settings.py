"""Try every wrong setting of ``wrong_cases.py`` on two ranks, and print what users are told as a markdown table.

    python tests/wrong_settings.py                                  # this tree
    cd OTHER_TREE && PYTHONPATH=$PWD python THIS_TREE/tests/wrong_settings.py         # another one, with the cases of this

A case is right if within 10 s every rank raises ``ConfigError`` whose text names the setting, shows the value, says what is
allowed and what to do. Only the package's public interface is used. A world of ranks tries cases in turn for as long as they
are right; one that falls short leaves nothing behind that could be trusted, and the next case gets new ranks.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable

import conftest  # noqa: F401  (threads, device, extensions)
import wrong_ranks
from wrong_cases import CASES, GROUPS, Wrong

from run.worlds import World

SECONDS = 10.0
RANKS = 2


def judge(case: Wrong, said: str, seconds: float) -> str:
    """What falls short of one rank's message; empty where nothing does."""
    if seconds > SECONDS:
        return f"after {seconds:.0f} s"
    if said == "nothing raised":
        return said
    if not case.setting:  # a mistake in the script itself: the same reason on every rank
        return "" if case.value in said or (case.shows or "") in said else "reason not told"
    kind, _, text = said.partition(": ")
    missing = [what for what, there in (
        ("its kind: ConfigError", kind == "ConfigError"),
        ("setting", case.setting.rpartition(".")[2] in text),
        ("value", case.value.strip("'\"[]") in text),
        ("what is allowed", "cannot be used: " in text),
        ("what to do", re.search(r"cannot be used: .*\S[.?:)\"'] .*\S", text) is not None)) if not there]
    return f"missing {', '.join(missing)}" if missing else ""


def attempt(world: World, number: int) -> list[tuple[str, float]]:
    """What every rank said to a case, or how it fell silent, and after how many seconds."""
    world.tell(number)
    return [one.value or (str(one.error), SECONDS) for one in world.listen(SECONDS, grace=SECONDS)]


def new_world() -> tuple[World, str]:
    """Ranks that have met, and the package that they try; again if they have not met, as where another process builds
    DeepSpeed's extension just then."""
    for _ in range(5):
        world = World(RANKS, wrong_ranks.serve)
        said = world.listen(20)
        if not any(one.error for one in said):
            return world, str(said[0].value)
        world.end()
    raise TimeoutError("ranks do not meet")


def run(groups: dict[str, list[Wrong]], show: Callable[[str], None] = print) -> tuple[list[tuple[str, Wrong, str]], str]:
    """Every case that falls short, with its group and how, and which package the ranks tried; the table goes to ``show``."""
    show("| group | wrong | within | told | falls short |\n|---|---|---|---|---|")
    short: list[tuple[str, Wrong, str]] = []
    world, package = new_world()
    for group, members in groups.items():
        for case in members:
            answers = attempt(world, CASES.index(case))
            faults = [f"rank {r}: {fault}" for r, (said, seconds) in enumerate(answers) if (fault := judge(case, said,
                                                                                                           seconds))]
            told = answers[0][0].splitlines()[:1]
            row = [group, case.name, f"{max(s for _, s in answers):.1f} s", *(told or [""]), "; ".join(faults)]
            show("| " + " | ".join(cell.replace("|", "/")[:400] for cell in row) + " |")
            if faults:
                short.append((group, case, "; ".join(faults)))
                world.end()
                world, package = new_world()
    world.end()
    return short, package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", action="append", choices=tuple(GROUPS), help="only these (default: all)")
    args = parser.parse_args()
    groups = {name: cases for name, cases in GROUPS.items() if not args.group or name in args.group}
    count = sum(map(len, groups.values()))
    start = time.monotonic()
    short, package = run(groups, lambda line: print(line, flush=True))
    print(f"\n{len(short)} of {count} fall short ({package}, {time.monotonic() - start:.0f} s)")
    sys.exit(bool(short))


if __name__ == "__main__":
    main()
