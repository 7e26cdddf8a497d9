"""The limited link: its commands, that nothing of it is left, what it refuses, and, for root, that it limits."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import limited_link
from bench import limited, namespaces
from bench.namespaces import Cable, NoNamespaces, cable, check_rights, left_behind
from bench.plan import Configuration
from bench.report import Measurement
from ds_decoupled.errors import ConfigError

ROOT = os.geteuid() == 0 and None not in (shutil.which("ip"), shutil.which("tc"))
needs_root = pytest.mark.skipif(not ROOT, reason="network namespaces need root and iproute2")


# -- commands -------------------------------------------------------------------------------------------------------------


def test_commands() -> None:
    made = Cable(("a", "b"))
    assert [" ".join(command) for command in made.lay()] == [
        "ip netns add a", "ip netns add b",
        "ip link add link0 netns a type veth peer name link0 netns b",
        "ip -n a address add 10.203.0.1/30 dev link0", "ip -n a link set lo up", "ip -n a link set link0 up",
        "ip -n b address add 10.203.0.2/30 dev link0", "ip -n b link set lo up", "ip -n b link set link0 up"]
    assert [" ".join(command) for command in made.limit(100)] == [
        f"tc -n {name} qdisc replace dev link0 root tbf rate 100mbit burst 128kb limit 8mb" for name in "ab"]
    assert [" ".join(command) for command in made.limit(None)] == [
        f"tc -n {name} qdisc replace dev link0 root noqueue" for name in "ab"]
    assert [" ".join(command) for command in made.remove()] == ["ip netns delete a", "ip netns delete b"]


def test_what_a_killed_run_left() -> None:
    names = ["ds-link-7-0", "ds-link-7-1", "ds-link-8-0", "ds-link-7-2", "my-ds-link-7-0", "ds-link-x-0", "other"]
    assert left_behind(names, lambda pid: pid == 8) == ["ds-link-7-0", "ds-link-7-1"]


class Recorder:
    """In the place of ``subprocess.run``: keeps namespaces, and fails at the command that it is told."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.names, self.failed = fails, {"ds-link-2000000000-1", "other"}, 0

    def __call__(self, command: list[str], **_: Any) -> Any:
        text = " ".join(command)
        self.failed = int(bool(self.fails) and self.fails in text)
        if not self.failed and command[:2] == ["ip", "netns"]:
            (self.names.add if command[2] == "add" else self.names.remove)(command[3])
        return type("Done", (), {"returncode": self.failed, "stderr": "Operation not permitted\n" * self.failed})


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(namespaces.subprocess, "run", recorder)
    monkeypatch.setattr(namespaces, "_names", lambda: set(recorder.names))
    monkeypatch.setattr(namespaces, "check_rights", lambda user, find: None)
    return recorder


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, ValueError, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left(end: Any, record: Recorder) -> None:
    """However the block ends; and what a killed run left goes first."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def use() -> None:
        with cable() as laid:
            assert record.names == {*laid.names, "other"}
            if isinstance(end, signal.Signals):
                os.kill(os.getpid(), end)
            elif end is not None:
                raise end

    if end is None:
        use()
    else:
        with pytest.raises(KeyboardInterrupt if isinstance(end, signal.Signals) else end):
            use()
    assert record.names == {"other"}
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.mark.parametrize("fails", ["-1", "type veth", "address add 10.203.0.2"])
def test_half_laid(fails: str, record: Recorder) -> None:
    record.names, record.fails = {"other"}, fails
    with pytest.raises(NoNamespaces, match=f"`.*{fails}.*` failed: Operation not permitted"), cable():
        raise AssertionError
    assert record.names == {"other"}


def test_what_cannot_be_removed_is_told(record: Recorder) -> None:
    record.names = {"other"}
    with pytest.raises(NoNamespaces, match="ds-link-.*-0, ds-link-.*-1 could not be removed"), cable():
        record.fails = "delete"


# -- refusals -------------------------------------------------------------------------------------------------------------


def test_rights() -> None:
    check_rights(0, lambda command: command)
    with pytest.raises(NoNamespaces, match="need root: run it by sudo$"):
        check_rights(1000, lambda command: command)
    with pytest.raises(NoNamespaces, match="no command tc was found: install iproute2"):
        check_rights(0, lambda command: None if command == "tc" else command)


def test_without_root_the_script_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit, match="^[^\n]*need root: run it by sudo$"):
        limited_link.main(["--output", str(tmp_path / "link.json")])


@pytest.mark.parametrize(("text", "message"), [
    ("adam", "two ranks can run"), ("bare-petra", "two ranks can run"), ("1f1b:int8", "send tensors as they are"),
    ("petra:int5", "codec"),
])
def test_methods_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        limited.read_method(text, k=4, layers=10)


def test_methods() -> None:
    assert limited.read_method("1f1b", 4, 10) == Configuration("1f1b", 2, 4)
    found = limited.read_method("petra:int8", 1, 10)
    assert found == Configuration("petra", 2, 1, "int8") and found.label == "petra, int8"


# -- numbers ----------------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round() -> None:
    free, slow = Measurement(rates=[10.0, 30.0, 20.0], idle=[[0, 0.5]]), Measurement(rates=[9.0, 24.0, 19.0], idle=[[0.1, 0]])
    by_speed: dict[int | None, Measurement] = {None: free, 100: slow}
    assert limited.against_no_limit(by_speed, 100) == 0.9
    text = limited.report({Configuration("petra", 2, 4, "int8"): by_speed}, {None: 4000.0, 100: 95.0})
    assert "| petra, int8 | 0 | 20.0 | 19.0 | 0.900 |" in text and "| petra, int8 | 0% / 50% | 10% / 0% |" in text
    assert "| 100 Mb/s | 95 |" in text


@needs_root
def test_a_real_cable_limits() -> None:
    with cable() as laid:
        found = limited.look_at(laid, [None, 200, 50])
        assert set(laid.names) <= namespaces._names()
    assert not set(laid.names) & namespaces._names()
    # Busy machines are slower, and a bucket that was full lets a little more through.
    assert found[50] < 60 < found[None] and found[200] < 240
