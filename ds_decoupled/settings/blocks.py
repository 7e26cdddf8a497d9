"""A block of the JSON as its pydantic model, and what a user is told where it is none.

A field's type, its range and the words for it stand together; :func:`read_model` is the one place that makes a
:class:`~ds_decoupled.errors.ConfigError` of a pydantic error, for blocks within blocks too.

>>> from pydantic import Field
>>> class Replay(BaseModel):
...     model_config = STRICT
...     size: int = Field(8, ge=1)
>>> read_model(Replay, {"size": 0}, "decoupled.replay")
Traceback (most recent call last):
ds_decoupled.errors.ConfigError: "decoupled.replay.size": 0 cannot be used: needed is greater than or equal to 1. \
Give such a number, or leave it out.

With words of its own:
``size: Annotated[int, Field(ge=1), Words("micro-batches kept, at least 1", "Leave it out for 8.")] = 8``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.kinds import WITHOUT_QUOTES, check_keys, hint_for, near

#: Of every block of ours: what stands in the JSON is meant, "1" is no number, and no name is free.
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Words:
    """Beside a field's type (``Annotated[int, Field(ge=1), Words(…)]``): what it is told with.

    Attributes:
        allowed: the values allowed; where it is empty, pydantic's words stand.
        hint: what to do.
    """

    allowed: str = ""
    hint: str = ""


def read_model(model: type[Model], given: Mapping[str, Any], path: str) -> Model:
    """``given`` as ``model``.

    Raises:
        ConfigError: naming the setting with dots from ``path``, the value given, what is allowed and what to do.
    """
    try:
        return model(**given)
    except ValidationError as error:
        raise refusal(path, model, given, error) from error


def refusal(path: str, model: type[BaseModel], given: Mapping[str, Any], error: ValidationError,
            otherwise: str = "") -> ConfigError:
    """``error``, which ``model(**given)`` raised, as a user is told it.

    A model's validators may raise :class:`ConfigError` themselves: a field's is told under the field's name, a whole model's
    as it is.

    Args:
        path: the block's name.
        otherwise: what to do about a field that has no :class:`Words`.
    """
    errors = error.errors(include_url=False)
    # A name that does not exist is told first: it may be why another is missing.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    loc = first["loc"]
    if not loc:
        own = _own(first)
        if own is None:
            return ConfigError(path, dict(given), _message(first), otherwise)
        name, value, *said = own.fields
        return ConfigError(name, given.get(name.removeprefix(f"{path}."), value), *said)  # as it was written
    depth, value = 0, cast(Any, given)
    while True:  # down through blocks within blocks
        key = str(loc[depth])
        if first["type"] == "extra_forbidden" and depth == len(loc) - 1:
            return _unknown(path, key, value[key], model)
        path, depth = f"{path}.{key}", depth + 1
        field = model.model_fields.get(key)
        value = value.get(key) if isinstance(value, Mapping) else None
        inner = _block_of(field)
        if inner is None or depth == len(loc) or not isinstance(value, Mapping):
            break
        model = inner
    return _told(path, value, field, [e for e in errors if e["loc"][:depth] == loc[:depth]], otherwise)


def _told(path: str, value: Any, field: FieldInfo | None, errors: list[Any], otherwise: str) -> ConfigError:
    """One setting's errors; there are several where it may be of several types."""
    words = Words() if field is None else _words((field.annotation, *field.metadata)) or Words()
    hint = words.hint or otherwise
    said = next((e for e in errors if not _is_of_type(e)), None)  # the value is of the type that this one is about
    if said is None:
        types = " or ".join(dict.fromkeys(map(_type, errors)))
        allowed = f"needed is {types}" + (f": {words.allowed}" if words.allowed else "")
        return ConfigError(path, value, allowed, hint_for(value, otherwise or WITHOUT_QUOTES))
    own = _own(said)
    if own is not None:
        return ConfigError(path, *own.fields[1:])
    if said["type"] == "literal_error":
        choices = _choices(said)
        return ConfigError(path, value, f"allowed are {', '.join(map(repr, choices))}", near(value, choices))
    if said["type"] == "missing":
        return ConfigError(path, None, words.allowed or "it is needed", hint)
    of_validator = said["type"] in ("value_error", "assertion_error")  # whose words are about this value, a field's about all
    return ConfigError(path, value, _message(said) if of_validator else words.allowed or _needed(said), hint or hint_for(value))


def _unknown(path: str, key: str, value: Any, model: type[BaseModel]) -> ConfigError:
    try:
        check_keys(path, {key: value}, tuple(model.model_fields))
    except ConfigError as error:
        return error
    raise AssertionError(f"{path}.{key} is a setting")


def _own(error: Any) -> ConfigError | None:
    """The error that a validator of ours raised."""
    raised = error.get("ctx", {}).get("error")
    return raised if isinstance(raised, ConfigError) else None


def _words(kinds: Iterable[Any]) -> Words | None:
    """The first that stand in an annotation, or within it."""
    for kind in kinds:
        if isinstance(kind, Words):
            return kind
        found = _words((*getattr(kind, "__metadata__", ()), *get_args(kind)))
        if found is not None:
            return found
    return None


def _block_of(field: FieldInfo | None) -> type[BaseModel] | None:
    """The block that a field is, or may be."""
    if field is None:
        return None
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _is_of_type(error: Any) -> bool:
    kind: str = error["type"]
    return kind.endswith("_type") or kind == "int_from_float" or kind == "literal_error" and not isinstance(error["input"], str)


def _type(error: Any) -> str:
    if error["type"] == "literal_error":
        return f"a string in quotes, one of {', '.join(map(repr, _choices(error)))}"
    return _message(error)


def _choices(error: Any) -> tuple[str, ...]:
    return tuple(re.findall(r"'([^']*)'", error["ctx"]["expected"]))


def _needed(error: Any) -> str:
    text = _message(error)
    return f"needed is {text}" if text != error["msg"] else text


def _message(error: Any) -> str:
    text: str = error["msg"]
    for start in ("Input should be ", "Value error, ", "Assertion failed, "):
        text = text.removeprefix(start)
    return text
