"""What ranks do together before training: an error of one is raised by all, and all have the same settings.

A rank that raises by itself leaves the others in a call that it will never join, until the time-out. So all that may find a
mistake while the engine is made runs inside :func:`together`, between the collective calls of its making.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist

from ds_decoupled.errors import ConfigError, PeerError, RankError, Verbatim, one_line

T = TypeVar("T")

Told = tuple[str, tuple[Any, ...]] | None
"""What other ranks learn of a rank's error: the kind, and what it is made of."""


def wait_for_all() -> None:
    """All ranks are here, and all process groups that they made so far stand.

    To be called before what may find a mistake: a rank that leaves resets the connections of those that still make theirs, and
    they would tell of nothing but that.
    """
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """``value`` of every rank; of this one alone where no process group stands."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank(source: int, value: T) -> T:
    """``value`` of rank ``source``, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=source)
    return box[0]


def averaging(group: Any) -> Callable[[torch.Tensor], None] | None:
    """A function that averages a tensor over the ranks of ``group``, in place; None where that is None, a single rank."""
    if group is None:
        return None

    def average(value: torch.Tensor) -> None:
        dist.all_reduce(value, group=group)
        value /= dist.get_world_size(group)

    return average


def first_reason(error: Exception | None, group: Any, device: torch.device) -> str | None:
    """Why the first of the ranks of ``group`` that failed did, on all of them; None where none did. A collective call.

    One number is reduced, because this stands in every training call; words are gathered only where there are any.
    """
    # On the device, so that NCCL's group can reduce it.
    failed = torch.tensor([0 if error is None else 1], device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if not failed.item():
        return None
    reasons: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, None if error is None else one_line(error), group=group)
    return next(reason for reason in reasons if reason is not None)


def error_of_group(error: Exception | None, group: Any, device: torch.device) -> Exception | None:
    """What the data of this replica failed with, or of another replica of ``group`` (None for the only one), whose ranks would
    wait for this one's gradients or loss. A collective call of the group."""
    if group is None:
        return error
    reason = first_reason(error, group, device)
    if error is not None or reason is None:
        return error
    if reason.startswith(StopIteration.__name__):
        return StopIteration("the data of another replica ended")
    return PeerError(f"the data of another replica failed: {reason}", 0, reason)


@overload
def together(action: Callable[[], T]) -> T: ...
@overload
def together(action: Callable[[], T] | None) -> T | None: ...
def together(action: Callable[[], T] | None) -> T | None:
    """Run ``action`` on the ranks that have one; if it fails on any, every rank raises that rank's reason. A collective call.

    Args:
        action: makes no collective call of ranks that might fail by themselves.

    Raises:
        Exception: this rank's own, as it is.
        ConfigError: another rank's.
        RankError: if another rank failed of anything else; it says which and of what.
    """
    # Nothing may raise before the gather: the other ranks are on their way to it and would wait for ever.
    result, failure = _attempt(action)
    _raise_first(failure, gather(_tell(failure)))
    return result


def agreed(read: Callable[[], tuple[T, Mapping[str, Any]]], what: str) -> T:
    """What ``read`` gives first, once every rank has read the same settings. A collective call.

    Args:
        read: gives a result and the settings, by name, that must be the same on every rank.
        what: was read, in words.

    Raises:
        ConfigError: on every rank, if ``read`` failed on any (as in :func:`together`), or for the first setting that differs:
            it says which rank has which value.
    """
    result, failure = _attempt(read)
    told = gather((_tell(failure), None if result is None else {k: _shown(v) for k, v in result[1].items()}))
    _raise_first(failure, [error for error, _ in told])
    assert result is not None
    _compare([settings for _, settings in told], what)
    return result[0]


def _attempt(action: Callable[[], T] | None) -> tuple[T | None, Exception | None]:
    try:
        return (None if action is None else action()), None
    except Exception as error:
        return None, error


def _tell(error: Exception | None) -> Told:
    if error is None:
        return None
    if isinstance(error, ConfigError):
        setting, value, allowed, hint = error.fields
        return "setting", (setting, _portable(value), allowed, hint)
    return "other", (f"{type(error).__name__}: {error}",)


def _portable(value: Any) -> Any:
    """What another process can be told: functions and the like by their ``repr``."""
    try:
        # Both ways: a class that was defined in a script can be pickled here and not be found there.
        pickle.loads(pickle.dumps(value))
    except Exception:
        return Verbatim(repr(value))
    return value


def _raise_first(own: Exception | None, told: list[Told]) -> None:
    if own is not None:
        raise own
    for rank, failure in enumerate(told):
        if failure is not None:
            kind, fields = failure
            raise ConfigError(*fields) if kind == "setting" else RankError(f"rank {rank} failed: {fields[0]}")


def _shown(value: Any) -> str:
    """The same text for the same setting on every rank: no addresses, no order of keys."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_shown(v)}" for k, v in sorted(value.items(), key=lambda item: str(item[0]))) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if value is None or isinstance(value, bool | str | int):
        return repr(value)
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() else repr(value)
    name = getattr(value, "__qualname__", None)
    return f"{getattr(value, '__module__', '')}.{name}" if name else type(value).__qualname__


LEFT_OUT = "left out"


def _compare(by_rank: list[Mapping[str, str]], what: str) -> None:
    different: dict[str, dict[str, list[int]]] = {}
    for name in dict.fromkeys(name for settings in by_rank for name in settings):
        values: dict[str, list[int]] = defaultdict(list)
        for rank, settings in enumerate(by_rank):
            value = settings.get(name, LEFT_OUT)
            values[LEFT_OUT if value == "None" else value].append(rank)
        if len(values) > 1:
            different[name] = values
    if not different:
        return
    first, *others = different
    told = ", ".join(f"{value} on rank{'s' if len(ranks) > 1 else ''} {_ranks(ranks)}"
                     for value, ranks in different[first].items())
    more = f"; also different: {', '.join(others)}" if others else ""
    raise ConfigError(first, Verbatim(told), f"every rank needs the same {what}{more}", "Give all ranks the same.")


def _ranks(ranks: list[int], most: int = 8) -> str:
    return ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their names with dots.

    >>> flat({"bf16": {"enabled": True}, "steps": 3})
    {'bf16.enabled': True, 'steps': 3}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found
