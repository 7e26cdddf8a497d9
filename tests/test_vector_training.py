"""Training with codebooks: it learns, is the same on any number of ranks and after a stop; all ranks refuse what cannot be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import engine_cases
import free_cases
import pytest
import torch
import worlds
from nets import CLASSES
from test_codec_training import BETWEEN, learn

VQ: dict[str, Any] = {"codec": {"forward": "vq", "backward": "int8"}, "vq": {"group": 4, "codebook": 16, "every": 5}}
NET = {"net_args": {"channels": 8}}


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [engine_cases.train(case) for case in cases]


def learn_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [learn(case) for case in cases]


def refusals(cases: list[dict[str, Any]]) -> list[str]:
    """What building and three calls of training fail with."""
    found = []
    for case in cases:
        try:
            engine_cases.train(case)
            found.append("nothing")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_it_learns() -> None:
    """Up by codebooks, down by int8; chance is log 3 = 1.10."""
    case = {"batches": 50, "size": 8, "lr": 0.02, "block": {**VQ, **BETWEEN}, **NET}
    for run in worlds.run(2, learn_all, [{**case, "method": method} for method in ("dgl", "petra")])[1]:
        last, first = sum(run["losses"][-10:]) / 10, sum(run["losses"][10:20]) / 10
        assert last < 0.8 * math.log(CLASSES) and last < 0.9 * first, (first, last)


def test_every_link_makes_ranks_alike() -> None:
    """Bit for bit on one rank and on two; and not what comes of it where codecs act between ranks alone."""
    codecs: list[dict[str, Any]] = [{"codec": {"forward": "int8", "backward": "int8"}}, VQ]
    cases = [{"method": method, "batches": 12, **NET, "block": {**block, "codec": {**block["codec"], "every_link": True}}}
             for method in ("dgl", "petra") for block in codecs]
    ring = {"pace": "clock", "replay": {"size": 3, "memory": "host"}, "input_shape": [2, 8, 8]}
    cases += [{**case, "method": "dgl_async", "block": {**case["block"], **ring}} for case in cases[:2]]
    between = {**cases[3], "block": VQ}
    one, two = (worlds.run(ranks, train_all, [*cases, between]) for ranks in (1, 2))
    for i, case in enumerate(cases):
        a, b = (engine_cases.merged([results[i] for results in run]) for run in (one, two))
        assert all(torch.equal(a[name], b[name]) for name in a), case
    a, b, c = one[0][-1]["state"], one[0][3]["state"], engine_cases.merged([results[-1] for results in two])
    assert all(any(not torch.equal(x[name], y[name]) for name in x) for x, y in ((a, b), (a, c)))
    # Rings keep codes and not numbers: three pictures' streams of 2 x 4 x 8 x 8 x 8 float32 in each.
    for results in (one, two):
        for case in (4, 5):
            [*rings] = results[0][case]["summary"]["replay"]
            assert all(0 < ring["bytes"] < 0.5 * 3 * 2 * 4 * 8 * 8 * 8 * 4 for ring in rings), rings


@pytest.mark.parametrize(("method", "every_link", "other"), [("dgl", False, 2), ("petra", True, 1), ("dgl_async", True, 1)])
def test_resumed_in_mid_flight(method: str, every_link: bool, other: int, tmp_path: Path) -> None:
    """Bit for bit: the checkpoint has what the senders have learned and what they last sent; with every link on another number
    of ranks too."""
    block = {**VQ, "codec": {**VQ["codec"], "every_link": every_link}, **BETWEEN}
    if method == "dgl_async":
        block |= {"pace": "clock", "replay": {"size": 3}, "input_shape": [2, 8, 8]}
    case = {"method": method, "k": 2, "batches": 24, "stop": 4, "block": block, **NET}
    whole = worlds.run(2, engine_cases.train, case)
    worlds.run(2, engine_cases.train_and_stop, case, str(tmp_path))
    if other == 1:
        del block["partition"]
    resumed = worlds.run(other, engine_cases.resume, case, str(tmp_path))
    a, b = engine_cases.merged(whole), engine_cases.merged(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ranks_that_run_free() -> None:
    """What comes is read in its order by a thread, and kept as it came."""
    block = {**VQ, "codec": {"forward": "vq"}, "input_shape": [2, 8, 8], "replay": {"size": 4}}
    case = {"method": "dgl_async", "calls": 20, "timeout": 60, "block": block, **NET}
    results = worlds.run(2, free_cases.train, case)
    assert all(value.isfinite().all() for value in engine_cases.merged(results).values())
    sizes = [ring["bytes"] for ring in results[0]["summary"]["replay"]]
    border = results[1]["summary"]["rank_stages"][1][0] - 1  # the first ring is the second stage's
    assert sizes[border] < 0.6 * max(sizes), sizes


def test_token_streams() -> None:
    """(N, T, features), of lengths that vary."""
    case = {"method": "petra", "net": "gpt", "varied": True, "batches": 8, "k": 2, "block": VQ, "net_args": {}}
    results = worlds.run(2, engine_cases.train, case)
    assert all(value.isfinite().all() for value in engine_cases.merged(results).values())


def test_refusals_reach_every_rank() -> None:
    """Where heads are built before anything is sent, else by the first message."""
    def case(method: str, **vq: Any) -> dict[str, Any]:
        return {"method": method, "batches": 3, "block": {**VQ, "vq": {**VQ["vq"], **vq}, **BETWEEN}, **NET}

    below, above = worlds.run(2, refusals, [case("dgl", group=3), case("dgl", codebook=257), case("petra", group=3)])
    for text in (below[0], above[0]):
        assert text.startswith('ConfigError: "decoupled.vq.group": 3') and "(4, 8, 8, 8) has 8" in text
    for text in (below[1], above[1]):
        assert text.startswith('ConfigError: "decoupled.vq.codebook": 257') and "256 of each group" in text
    assert below[2].startswith('ConfigError: "decoupled.vq.group": 3')
    assert above[2].startswith("PeerError") and '"decoupled.vq.group": 3 cannot be used' in above[2]
