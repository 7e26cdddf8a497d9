"""The errors a user can meet; each says what to do."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work: names the setting, the value given, what is allowed and what to do."""

    def __init__(self, setting: str, value: Any, allowed: str, hint: str = "") -> None:
        self.setting = setting
        self.fields = setting, value, allowed, hint
        text = f'"{setting}": {value!r} cannot be used: {allowed}'
        super().__init__(f"{text}. {hint}" if hint else f"{text}.")


class RankError(RuntimeError):
    """Another rank failed while all made something together; says which, and of what."""


class Verbatim(str):
    """A text that stands in messages without quotes: a value as another rank told it, or several values at once."""

    def __repr__(self) -> str:
        return str(self)


class LinkError(RuntimeError):
    """A message that did not come, or that is not the one that was due."""


class PlanError(RuntimeError):
    """A plan that cannot run: a deadlock, or an action without what it needs."""
