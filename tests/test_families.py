"""A sample of the table of families: ``recipes/families.py`` makes all of it."""

from __future__ import annotations

import pytest
import torch.distributed as dist
import worlds

from families import page
from lm.families import Outcome, names, try_family


def outcomes(families: list[str]) -> list[tuple[str, bool, str, dict[str, str]]]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = [try_family(name, 60) for name in families]
    return [(o.name, o.good, o.refused, o.found) for o in found]


def test_a_sample() -> None:
    """Renamed and fused weights, latent attention, a tied head with a bias, a mask of the weights' type; no chains."""
    [found] = worlds.run(1, outcomes, ["granitemoe", "gpt_neox", "deepseek_v3", "bert", "openai-gpt", "zamba", "hy_v4"])
    for name, good, refused, columns in found:
        assert good or name in ("zamba", "hy_v4"), (name, refused, columns)
    assert "layers share weights" in found[-2][2] or "original_hidden_states" in found[-2][2]
    assert "not one stream" in found[-1][2]


def test_the_page() -> None:
    told = page([Outcome("one", {"model": "yes", "logits": "yes"}), Outcome("two", refused="no chain"),
                 Outcome("three", {"model": "KeyError: size"})])
    assert "| `one` | yes | – |" in told and "| `two` | no chain |" in told and "0 of 3 are right" in told
    assert len(names()) > 100


@pytest.mark.parametrize("name", ["nothing"])
def test_what_is_no_family(name: str) -> None:
    assert "ValueError" in try_family(name, 60).found["model"]
