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

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.fields  # by default a copy is made of the message alone, which is no argument of this


class LinkError(RuntimeError):
    """A message that did not come, or that is not the one that was due."""


class PlanError(RuntimeError):
    """A plan that cannot run: a deadlock, or an action without what it needs."""
