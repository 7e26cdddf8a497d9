"""Names on the hub without a network: an error within seconds, and whatever was set before is set again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from data import hub
from data.text import read_text
from data.tokens import HuggingFaceTokenizer
from ds_decoupled.errors import ConfigError


@pytest.mark.parametrize("look", [read_text, HuggingFaceTokenizer], ids=["data", "tokenizer"])
def test_no_network(look: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(ConfigError, match="nobody/nothing"):
        look("nobody/nothing")
    assert time.monotonic() - start < 10 and constants.HF_HUB_OFFLINE is False


def test_places_on_this_machine_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda: pytest.fail("the hub was asked"))
    with hub.reached_or_offline(str(tmp_path)):
        pass
