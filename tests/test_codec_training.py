"""Training between ranks with codecs: it learns, it takes the bytes that were counted, it can be stopped and resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import engine_cases
import pytest
import torch
import worlds
from nets import CLASSES

from ds_decoupled.links.message import HEADER_BYTES

#: The ranks' border lies between two couplings, so that reconstructions travel too.
BETWEEN = {"partition": [0, 2, 7]}


def trained(method: str, codec: Any, ranks: int = 2, **case: Any) -> list[dict[str, Any]]:
    case = {"method": method, "block": {"codec": codec, **BETWEEN}, "net_args": {"channels": 8}, **case}
    return worlds.run(ranks, engine_cases.train, case)


def learn(case: dict[str, Any]) -> dict[str, Any]:
    """Train on pictures of noise in front of their class's own; the losses and the bytes."""
    engine = engine_cases.build(case)
    generator = torch.Generator().manual_seed(0)
    backgrounds = torch.randn(CLASSES, 2, 8, 8, generator=generator)
    made = []
    for _ in range(case["batches"]):
        y = torch.randint(0, CLASSES, (case["size"],), generator=generator)
        made.append((backgrounds[y] + torch.randn(case["size"], 2, 8, 8, generator=generator), y))
    data = iter(made) if engine.is_first_stage() else None
    losses = [engine.train_batch(data).item() for _ in made]
    engine.drain()
    return {"losses": losses, "bytes": engine.decoupled_summary()["bytes_sent"]}


@pytest.mark.parametrize(("method", "codec"), [
    ("petra", "int8"), ("petra", {"forward": "int8", "backward": "bf16"}), ("dgl", "int4"), ("dsp", "fp8"),
    ("delayed", {"backward": "int4"}), ("overlapping", "int4-rotated")])
def test_it_learns(method: str, codec: Any) -> None:
    """By other numbers and in fewer bytes; at least half as far as without a codec."""
    case = {"method": method, "batches": 60, "size": 8, "lr": 0.02, "net_args": {"channels": 8}}
    plain, coded = (worlds.run(2, learn, {**case, "block": {"codec": name, **BETWEEN}})[1] for name in ("none", codec))
    last = sum(coded["losses"][-10:]) / 10
    wanted = sum(plain["losses"][-10:]) / 10
    assert last < (wanted + math.log(CLASSES)) / 2, (last, wanted)
    assert coded["losses"][-1] != plain["losses"][-1] and coded["bytes"] < plain["bytes"]


def test_again_is_the_same() -> None:
    """Chance is drawn from the run's seed."""
    case = {"batches": 12}
    one, two = (engine_cases.merged(trained("petra", "int4", **case)) for _ in range(2))
    other = engine_cases.merged(trained("petra", "int4", **case, seed=1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_resumed_in_mid_flight(tmp_path: Path) -> None:
    """Bit for bit: what chance draws hangs on the seed, which the checkpoint holds, and the micro-batch."""
    block = {"codec": {"forward": "int8", "backward": "int4"}, **BETWEEN}
    case = {"method": "petra", "k": 2, "batches": 18, "stop": 3, "block": block, "net_args": {"channels": 8}}
    whole = worlds.run(2, engine_cases.train, case)
    worlds.run(2, engine_cases.train_and_stop, case, str(tmp_path))
    resumed = worlds.run(2, engine_cases.resume, case, str(tmp_path))
    a, b = engine_cases.merged(whole), engine_cases.merged(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_rank_has_no_links() -> None:
    plain, coded = (engine_cases.merged(trained("petra", name, ranks=1, batches=8, block={"codec": name}))
                    for name in ("none", "int4"))
    assert all(torch.equal(plain[name], coded[name]) for name in plain)


def evaluated(case: dict[str, Any]) -> dict[str, Any]:
    """The losses of an evaluation, before any training."""
    engine = engine_cases.build(case)
    losses = [engine.eval_batch(engine_cases.data_of(case, engine), num_micro_batches=3).item()]
    return {"losses": losses}


def test_evaluation_is_exact() -> None:
    """Whatever the codec: on two ranks it says what one says."""
    case = {"method": "petra", "batches": 3, "block": {"codec": "int4"}, "net_args": {"channels": 8}}
    one, two = worlds.run(1, evaluated, case), worlds.run(2, evaluated, case)
    assert one[0]["losses"] == two[0]["losses"] == two[1]["losses"]


def test_bytes_are_those_counted() -> None:
    """petra's links carry two streams up, and both with their gradients down; labels and losses beside them."""
    sent = {name: trained("petra", codec, batches=12)[0]["summary"] for name, codec in (
        ("none", "none"), ("int8", "int8"), ("int4", "int4"), ("up", {"forward": "int8"}))}
    messages = sent["none"]["messages_sent"]
    stays = (HEADER_BYTES + 64) * messages + 2 * HEADER_BYTES  # headers, labels or loss; two announcements of a size
    payload = {name: summary["bytes_sent"] - stays for name, summary in sent.items()}
    numbers = 12 * 6 * 4 * 8 * 8 * 8  # of 6 tensors (4, 8, 8, 8) a micro-batch
    scales = 12 * 6 * 64  # 8 channels a tensor, on its multiple of 64 bytes
    assert payload["none"] == 4 * numbers
    assert payload["int8"] == numbers + scales
    assert payload["int4"] == numbers // 2 + scales
    assert payload["up"] == 4 * numbers * 2 // 6 + (numbers + scales) * 4 // 6  # gradients alone as they are


def test_shapes_that_change() -> None:
    """A message's size follows from its shapes, and those change from one micro-batch to the next."""
    case = {"net": "gpt", "varied": True, "batches": 14, "k": 2, "net_args": {}, "block": {"codec": "int4-rotated"}}
    results = trained("petra", "int4-rotated", **case)
    assert all(value.isfinite().all() for value in engine_cases.merged(results).values())
