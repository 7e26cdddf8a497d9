"""Kinds of settings: each is a function of a setting's name and value that raises :class:`ConfigError` where they do not fit.

>>> whole(1)("train_batch_size", "8")
Traceback (most recent call last):
ds_decoupled.errors.ConfigError: "train_batch_size": '8' cannot be used: a whole number, at least 1. \
In JSON, numbers, true and false stand without quotes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ds_decoupled.errors import ConfigError

Check = Callable[[str, Any], None]

WITHOUT_QUOTES = "In JSON, numbers, true and false stand without quotes."
AUTO = '"auto" is filled in by Hugging Face\'s Trainer alone: give the value.'


def hint_for(value: Any, otherwise: str = "") -> str:
    """What to do about a value of the wrong type."""
    if isinstance(value, str):
        return AUTO if value == "auto" else WITHOUT_QUOTES
    return "Leave it out for the default." if value is None else otherwise or "Give such a number, or leave it out."


def whole(least: int, most: int | None = None, why: str = "", hint: str = "") -> Check:
    """A whole number from ``least`` to ``most``; ``why`` says where the bound comes from."""
    bounds = f"at least {least}" if most is None else f"at least {least} and at most {most}"
    allowed = f"a whole number, {bounds}" + (f": {why}" if why else "")

    def check(setting: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
            raise ConfigError(setting, value, allowed, hint_for(value, hint))

    return check


def number(least: float, most: float = math.inf, above: bool = False, why: str = "", hint: str = "") -> Check:
    """A finite number of at least (or ``above``) ``least``."""
    allowed = f"a number {'above' if above else 'of at least'} {least:g}" + (f", at most {most:g}" if most < math.inf else "")
    allowed += f": {why}" if why else ""

    def check(setting: str, value: Any) -> None:
        if (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
                or not (value > least if above else value >= least) or value > most):
            raise ConfigError(setting, value, allowed, hint_for(value, hint))

    return check


def flag(setting: str, value: Any) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise ConfigError(setting, value, "true or false", hint_for(value, "Give true or false."))


def text(setting: str, value: Any) -> None:
    """A string."""
    if not isinstance(value, str):
        raise ConfigError(setting, value, "a text in quotes", "Put it in quotes, or leave it out.")


def anything(setting: str, value: Any) -> None:
    """Not looked at here."""


def one_of(*allowed: Any, any_case: bool = False) -> Check:
    """One of these values."""

    def check(setting: str, value: Any) -> None:
        given = value.lower() if any_case and isinstance(value, str) else value
        if not any(type(given) is type(a) and given == a for a in allowed):
            raise ConfigError(setting, value, f"allowed are {', '.join(map(repr, allowed))}", near(value, allowed))

    return check


def optional(inner: Check) -> Check:
    """The same, or null."""

    def check(setting: str, value: Any) -> None:
        if value is not None:
            inner(setting, value)

    return check


def listing(inner: Check, what: str) -> Check:
    """A list, each entry of which is checked by ``inner``."""

    def check(setting: str, value: Any) -> None:
        if not isinstance(value, list | tuple):
            raise ConfigError(setting, value, f"a list of {what}", "Put it between [ and ].")
        for item in value:
            inner(setting, item)

    return check


def block(settings: Mapping[str, Check] | None = None, example: str = '{"enabled": true}') -> Check:
    """An object with some of these settings; None does not look inside."""

    def check(setting: str, value: Any) -> None:
        check_object(setting, value, example)
        if settings is None:
            return
        check_keys(setting, value, tuple(settings))
        for key, inner in value.items():
            settings[key](f"{setting}.{key}", inner)

    return check


def check_object(setting: str, value: Any, example: str) -> None:
    """An object with names for its values. Raises :class:`ConfigError` if it is none."""
    if not isinstance(value, dict):
        raise ConfigError(setting, value, f"an object such as {example}", "Put its settings between { and }, or leave it out.")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{setting}.{key}", value[key], "the names of settings are texts", "Put the name in quotes.")


def check_keys(setting: str, given: Mapping[str, Any], allowed: Collection[str]) -> None:
    """No name in ``given`` but ``allowed`` ones. Raises :class:`ConfigError`, which names the first that is none."""
    for key, value in given.items():
        if key not in allowed:
            name = f"{setting}.{key}" if setting else key
            raise ConfigError(name, value, f"there is no such setting; {setting or 'at the top'} takes "
                              f"{', '.join(sorted(allowed))}", near(key, tuple(allowed), "Is it spelled right?"))


def near(value: Any, allowed: Collection[Any], otherwise: str = "Take one of these, or leave the setting out.") -> str:
    """What was probably meant."""
    texts = [a for a in allowed if isinstance(a, str)]
    by_lower = {t.lower(): t for t in texts}
    found = difflib.get_close_matches(value.lower(), by_lower, n=1) if isinstance(value, str) else []
    return f"Did you mean {by_lower[found[0]]!r}?" if found else otherwise


def check_choice(setting: str, value: Any, allowed: Collection[str]) -> None:
    """One of ``allowed``. Raises :class:`ConfigError`, with what was probably meant, if it is not."""
    if value not in allowed:
        raise ConfigError(setting, value, f"allowed are {', '.join(map(repr, allowed))}", near(value, allowed))
