"""What one rank of a recipe fails with, every rank ends with, within seconds, whatever the others are waiting for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import recipe_runs
import worlds
from PIL import Image

from ds_decoupled.errors import ConfigError

SECONDS = 20.0
"""For all that a test does, also on a busy machine; without the notice board a rank waits for a minute at least."""


def _fail_on_one(rank: int, error: Exception, started: Callable[[], None]) -> None:
    """Rank ``rank`` fails; the others wait for it in ``started``."""
    sys.argv = ["a_recipe.py"]
    import torch.distributed as dist

    from run.processes import distributed

    with distributed("gloo"):
        if dist.get_rank() == rank:
            raise error
        started()


def _wait_for_all() -> None:
    import torch.distributed as dist

    dist.barrier()


def _wait_for_a_device() -> None:
    time.sleep(60)


def errors_of(world: int, fn: Callable[..., object], *args: object) -> list[str]:
    """What each rank ended with, a sentence or a traceback."""
    with pytest.raises(worlds.RankFailed) as failure:
        worlds.run(world, fn, *args, timeout=60)
    assert all(failure.value.errors), failure.value
    return [str(error) for error in failure.value.errors]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sentence_for_every_rank(rank: int) -> None:
    start = time.monotonic()
    for error in errors_of(3, _fail_on_one, rank, ConfigError("--data", "x.png", "it is broken", "Remove it"), _wait_for_all):
        assert error.startswith('SystemExit: a_recipe.py: "--data": \'x.png\' cannot be used: it is broken. Remove it\n'), error
    assert time.monotonic() - start < SECONDS


def test_what_is_no_mistake_of_the_users_is_traced_back_where_it_happened() -> None:
    first, second = errors_of(2, _fail_on_one, 1, ZeroDivisionError("odd"), _wait_for_all)
    assert first.startswith("SystemExit: a_recipe.py: rank 1 failed: ZeroDivisionError: odd\n")
    assert second.startswith("ZeroDivisionError: odd\n") and "Traceback" in second


def test_a_rank_that_nothing_wakes_is_ended() -> None:
    start = time.monotonic()
    first, second = errors_of(2, _fail_on_one, 0, ConfigError("--data", "x.png", "it is broken"), _wait_for_a_device)
    assert "it is broken" in first and "it is broken" in second
    assert time.monotonic() - start < SECONDS


@pytest.fixture
def large_pictures(tmp_path: Path) -> Path:
    """Decoded when they are needed: the truncated one is met after some updates, on the ranks that hold data."""
    for part, count in (("train", 16), ("test", 2)):
        for name in "ab":
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng(number).integers(0, 256, (70, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / part / name / f"{number}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("method", ["petra", "backprop"])
@pytest.mark.parametrize("broken", ["train/b/9.png", "test/a/0.png"])
def test_a_picture_that_breaks_in_the_middle_of_training(method: str, broken: str, large_pictures: Path,
                                                         tmp_path: Path) -> None:
    picture = large_pictures / broken
    picture.write_bytes(picture.read_bytes()[:3000])
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "optimizer": {"type": "SGD"},
        "decoupled": {"method": method, "stages": "ranks", **({} if method == "backprop" else {"timeout": 60})}}))
    start = time.monotonic()
    for error in errors_of(2, recipe_runs._main, "train_resnet",
                           ["--deepspeed_config", str(config), "--data", str(large_pictures), "--image_size", "72", "--width",
                            "4", "--epochs", "2", "--summary", str(tmp_path / "summary.json")]):
        assert error.startswith("SystemExit: train_resnet.py: \"--data\": ") and str(picture) in error, error
    assert time.monotonic() - start < 30
