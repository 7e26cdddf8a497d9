"""Names on the hub: without a network, what the cache has or an error at once, not after half a minute of further tries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 5.0
"""For one answer of the hub."""


@contextmanager
def reached_or_offline(name: str) -> Iterator[None]:
    """Libraries inside look for a network no longer if there is none: ``huggingface_hub`` would try six times for each file.

    Args:
        name: what is looked for; if that is a place on this machine, nothing is asked.
    """
    if Path(name).exists():
        yield
        return
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    offline = before[0] or not _answers()
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _answers() -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info("gpt2", timeout=SECONDS)
    except HfHubHTTPError:  # an answer, whatever it says
        return True
    except Exception:  # of the library that it uses for requests, which has changed from version to version
        return False
    return True
