"""The errors a user can meet; each says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot work: names the setting, the value given, what is allowed and what to do."""

    def __init__(self, setting: str, value: Any, allowed: str, hint: str = "") -> None:
        self.setting = setting
        self.fields = setting, value, allowed, hint
        text = f'"{setting}": {value!r} cannot be used: {allowed}'
        super().__init__(f"{text}. {hint}" if hint else f"{text}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.fields  # by default a copy is made of the message alone, which is no argument of this


class RankError(RuntimeError):
    """Another rank failed while all made something together; says which, and of what."""


class Verbatim(str):
    """A text that stands in messages without quotes: a value as another rank told it, or several values at once."""

    def __repr__(self) -> str:
        return str(self)


class LinkError(RuntimeError):
    """A message that did not come, or that is not the one that was due."""


class PeerError(LinkError):
    """Another rank failed and said why, so that every rank can say it.

    Attributes:
        rank: which one, on the pipe axis.
        reason: its error, in one line.
    """

    def __init__(self, text: str, rank: int, reason: str) -> None:
        super().__init__(text)
        self.rank, self.reason = rank, reason


class BatchError(TypeError):
    """A micro-batch of a form that cannot be trained on: says which form came and which is needed."""


class PlanError(RuntimeError):
    """A plan that cannot run: a deadlock, or an action without what it needs."""


def one_line(error: BaseException) -> str:
    """The error's type and what it says, for another message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:1000] if text else type(error).__name__


def naming(setting: str, value: Any, action: Callable[[], T]) -> T:
    """``action``, which is DeepSpeed's: its raw errors get the name and the value of the setting that they come from.

    Raises:
        ConfigError: for any error that is not yet one of ours.
    """
    try:
        return action()
    except (ConfigError, RankError):
        raise
    except Exception as error:
        raise ConfigError(setting, value, f"DeepSpeed cannot work with it here ({type(error).__name__}: {error})",
                          "See https://www.deepspeed.ai/docs/config-json/.") from error
