"""Two network namespaces of Linux, joined by a cable whose speed can be set: the kernel's own, by ``ip`` and ``tc``.

A namespace has network interfaces of its own, and nothing leaves it but through them. Two of them, joined by a pair of virtual
Ethernet interfaces, are two machines as far as TCP can tell; at either end a token bucket (``tc-tbf``) lets so many bits a
second out, so that each direction has the whole speed for itself.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

Command = list[str]

INTERFACE = "link0"
ADDRESSES = ("10.203.0.1", "10.203.0.2")
FOLDER = Path("/var/run/netns")
"""Where ``ip netns`` keeps names."""
BURST = "128kb"
"""Of the bucket: two of the largest segments that TCP hands to an interface; 1 ms at 1 Gb/s, 10 ms at 100 Mb/s."""
QUEUE = "8mb"
"""What may wait for tokens, before packets are dropped: more than TCP has under way, so that none is."""
ENDS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process, beside Ctrl-C's."""

_CLONE_NEWNET = 0x40000000
_NAME = "ds-link-{}-{}"


class NoNamespaces(Exception):
    """This process cannot have network namespaces; the sentence says what is missing."""


@dataclass(frozen=True)
class Cable:
    """Two namespaces and what joins them, as the commands that make, limit and remove it.

    Attributes:
        names: of the namespaces.
    """

    names: tuple[str, str]

    def lay(self) -> list[Command]:
        """Make both, join them, switch all on."""
        a, b = self.names
        commands = [["ip", "netns", "add", name] for name in self.names]
        commands.append(["ip", "link", "add", INTERFACE, "netns", a, "type", "veth", "peer", "name", INTERFACE, "netns", b])
        for name, address in zip(self.names, ADDRESSES):
            commands += [["ip", "-n", name, "address", "add", f"{address}/30", "dev", INTERFACE],
                         ["ip", "-n", name, "link", "set", "lo", "up"],
                         ["ip", "-n", name, "link", "set", INTERFACE, "up"]]
        return commands

    def limit(self, mbits: int | None) -> list[Command]:
        """Let ``mbits`` megabits a second through, in each direction; None: as many as there are."""
        bucket = ["noqueue"] if mbits is None else ["tbf", "rate", f"{mbits}mbit", "burst", BURST, "limit", QUEUE]
        return [["tc", "-n", name, "qdisc", "replace", "dev", INTERFACE, "root", *bucket] for name in self.names]

    def remove(self) -> list[Command]:
        """The interfaces go with their namespaces."""
        return [["ip", "netns", "delete", name] for name in self.names]


@contextmanager
def cable() -> Iterator[Cable]:
    """Within, there is a :class:`Cable`, not limited; behind it nothing is left, whatever ends the block.

    Raises:
        NoNamespaces: without the rights or the commands for it.
    """
    check_rights(os.geteuid(), shutil.which)
    made = Cable((_NAME.format(os.getpid(), 0), _NAME.format(os.getpid(), 1)))
    for name in left_behind(_names(), lambda pid: Path(f"/proc/{pid}").exists()):
        _run(["ip", "netns", "delete", name])
    before = {number: signal.signal(number, _interrupt) for number in ENDS}
    try:
        run_all(made.lay())
        yield made
    finally:
        # Nothing may interrupt this, nor the commands, which a second Ctrl-C would reach too.
        for number in (signal.SIGINT, *ENDS):
            before.setdefault(number, signal.signal(number, signal.SIG_IGN))
        for name, command in zip(made.names, made.remove()):
            if name in _names():
                subprocess.run(command, capture_output=True)
        for number, handler in before.items():
            signal.signal(number, handler)
    if left := sorted(_names().intersection(made.names)):
        raise NoNamespaces(f"{', '.join(left)} could not be removed: see `ip netns list`")


def check_rights(user: int, find: Callable[[str], object]) -> None:
    """Refuse what could not work.

    Args:
        user: effective user id of this process.
        find: says where a command is, None for nowhere.

    Raises:
        NoNamespaces: for any user but root, and without ``ip`` or ``tc``.
    """
    if user != 0:
        raise NoNamespaces("two network namespaces and a token bucket between them need root: run it by sudo")
    missing = [command for command in ("ip", "tc") if find(command) is None]
    if missing:
        raise NoNamespaces(f"no command {' and no command '.join(missing)} was found: install iproute2")


def left_behind(names: Iterable[str], alive: Callable[[int], bool]) -> list[str]:
    """Of ``names``, those of processes that were killed before they could remove them."""
    found = ((name, re.fullmatch(_NAME.format(r"(\d+)", "[01]"), name)) for name in names)
    return sorted(name for name, match in found if match and not alive(int(match[1])))


def run_all(commands: Iterable[Command]) -> None:
    """One after the other. Raises :class:`NoNamespaces` with what the first failing one said."""
    for command in commands:
        _run(command)


def enter(name: str) -> None:
    """Move the calling thread, and those that it will start, into a namespace (``setns``, which Python has from 3.12 on)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(FOLDER / name) as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"setns to {name}: {os.strerror(number)}")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise NoNamespaces(f"`{' '.join(command)}` failed: {said}")


def _names() -> set[str]:
    return {path.name for path in FOLDER.iterdir()} if FOLDER.is_dir() else set()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
