"""``optimizer`` and ``scheduler``: what they name is built once for a tensor of two numbers, before DeepSpeed builds it for
all.

What a constructor refuses (``momentun``, a rate in quotes or below 0) is then a setting's mistake with the setting's name, on
every rank, and not a traceback on those ranks that have parameters.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.kinds import AUTO, WITHOUT_QUOTES, Check, flag, listing, near, number, one_of, optional

OPTIMIZER_EXAMPLE = '"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}'
SCHEDULER_EXAMPLE = '"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}'

_betas = listing(number(0, 1), "two numbers from 0 to 1")
_lr = number(0)
#: What DeepSpeed's own optimizers take; it has them from extensions (``deepspeed/ops``) that are compiled when they are built.
_ADAM: dict[str, Check] = {"lr": _lr, "betas": _betas, "eps": number(0), "weight_decay": number(0), "bias_correction": flag,
                           "amsgrad": flag, "set_grad_none": flag, "adam_w_mode": flag, "torch_adam": flag,
                           "fp32_optimizer_states": flag}
OWN: dict[str, dict[str, Check]] = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "lion": {"lr": _lr, "betas": _betas, "weight_decay": number(0), "set_grad_none": flag},
    "lamb": {"lr": _lr, "betas": _betas, "eps": number(0), "weight_decay": number(0), "bias_correction": flag, "amsgrad": flag,
             "eps_inside_sqrt": flag, "max_grad_norm": number(0), "max_coeff": number(0), "min_coeff": number(0)},
    "muon": {"lr": _lr, "muon_lr": _lr, "adam_lr": _lr, "momentum": number(0, 1), "weight_decay": number(0),
             "ns_method": one_of("gram", "standard"), "betas": _betas, "eps": number(0), "adam_w_mode": flag,
             "torch_adam": flag,
             "fp32_optimizer_states": flag, "foreach": optional(flag), "per_head_muon": flag},
}
#: Of the "mup" package; they take what torch's take.
MUP = ("muadam", "muadamw", "musgd")

#: Torch's optimizers that do not step in proportion to the learning rate: a scheduler, or a stage's factor, would do nothing.
WITHOUT_RATE = ("Rprop",)


def torch_optimizers() -> tuple[str, ...]:
    """Names of torch's optimizers."""
    return tuple(sorted(name for name, kind in vars(torch.optim).items()
                        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer))


def schedulers() -> dict[str, Callable[..., Any]]:
    """LR schedulers by name: DeepSpeed's first, then torch's, as in ``_scheduler_from_config`` (runtime/engine.py)."""
    base = lr_scheduler.LRScheduler
    torchs = {name: kind for name, kind in vars(lr_scheduler).items()
              if isinstance(kind, type) and issubclass(kind, base) and kind is not base and not name.startswith("_")}
    return torchs | {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}


def type_and_params(setting: str, block: Mapping[str, Any], example: str) -> tuple[str, dict[str, Any]]:
    """Of an optimizer or a scheduler. Raises :class:`ConfigError` where they are missing or of another type."""
    kind, params = block.get("type"), block.get("params", {})
    if not isinstance(kind, str):
        raise ConfigError(f"{setting}.type", kind, "a name in quotes is needed", f"For example {example}.")
    if not isinstance(params, dict):
        raise ConfigError(f"{setting}.params", params, 'an object such as {"lr": 1e-3}', f"For example {example}.")
    return kind, params


def check_optimizer(block: Mapping[str, Any], setting: str = "optimizer") -> None:
    """An ``optimizer`` block whose type is DeepSpeed's or torch's; import paths are checked where they are imported
    (:mod:`ds_decoupled.optim.by_name`).

    Raises:
        ConfigError: naming the parameter, if there is no such optimizer or it does not take its parameters.
    """
    kind, params = type_and_params(setting, block, OPTIMIZER_EXAMPLE)
    _refuse_auto(setting, params)
    if "max_grad_norm" in params and kind.lower() != "lamb":
        raise ConfigError(f"{setting}.params.max_grad_norm", params["max_grad_norm"], "DeepSpeed's optimizers do not clip",
                          'Set "gradient_clipping" beside "optimizer".')
    if "." in kind:
        return
    if kind.lower() in MUP:
        _needs_mup(setting, kind)
    elif kind.lower() in ("adam", "adamw") and params.get("torch_adam") is True:
        torchs = torch.optim.AdamW if kind.lower() == "adamw" or params.get("adam_w_mode", True) is True else torch.optim.Adam
        own = {key: value for key, value in params.items() if key not in ("torch_adam", "adam_w_mode", "fp32_optimizer_states")}
        _build(setting, kind, torchs, own, extra=("torch_adam", "adam_w_mode", "fp32_optimizer_states"))
    elif kind.lower() == "adagrad":
        _build(setting, kind, torch.optim.Adagrad, params)
    elif kind.lower() in OWN:
        _check_own(setting, kind, OWN[kind.lower()], params)
    elif kind in torch_optimizers():
        _build(setting, kind, getattr(torch.optim, kind), params)
    else:
        names = (*torch_optimizers(), "Lion", "Lamb", "Muon", "MuAdam", "MuAdamW", "MuSGD")
        raise ConfigError(f"{setting}.type", kind, "neither DeepSpeed nor torch.optim has an optimizer of this name",
                          near(kind, names, 'Give its import path, such as "pytorch_optimizer.SOAP".'))


def _needs_mup(setting: str, kind: str) -> None:
    try:
        import mup  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{setting}.type", kind, f"it is of the package mup, which cannot be imported ({error})",
                          "pip install mup") from error


def _check_own(setting: str, kind: str, known: Mapping[str, Check], params: Mapping[str, Any]) -> None:
    for key, value in params.items():
        if key not in known:
            raise _no_parameter(setting, kind, key, value, tuple(known))
        known[key](f"{setting}.params.{key}", value)
    if isinstance(params.get("betas"), list | tuple) and len(params["betas"]) != 2:
        raise ConfigError(f"{setting}.params.betas", params["betas"], "two numbers from 0 to 1", "For example [0.9, 0.999].")


def _no_parameter(setting: str, kind: str, key: str, value: Any, known: tuple[str, ...]) -> ConfigError:
    return ConfigError(f"{setting}.params.{key}", value, f"{kind} takes {', '.join(known)}", near(key, known, "Leave it out."))


def _refuse_auto(setting: str, params: Mapping[str, Any]) -> None:
    for key, value in params.items():
        if isinstance(value, str) and value == "auto":
            raise ConfigError(f"{setting}.params.{key}", value, "a value is needed", AUTO)


_MANY = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _parameters_of(kind: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What its constructor takes beside the first argument."""
    return dict(list(inspect.signature(kind).parameters.items())[1:])


def check_signature(setting: str, name: str, kind: Callable[..., Any], params: Mapping[str, Any],
                    extra: tuple[str, ...] = ()) -> None:
    """``kind(first, **params)`` names no parameter that is not there, and leaves none out. Raises :class:`ConfigError`."""
    try:
        taken = _parameters_of(kind)
    except (TypeError, ValueError):  # no signature to be had
        return
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    named = tuple(key for key, p in taken.items() if p.kind not in _MANY)
    for key, value in params.items():
        if key not in named and not any_name:
            raise _no_parameter(setting, name, key, value, (*named, *extra))
    for key, p in taken.items():
        needed = p.default is inspect.Parameter.empty and p.kind not in _MANY
        if needed and key not in params:
            raise ConfigError(f"{setting}.params.{key}", None, f"{name} needs it", "Set it.")


def _build(setting: str, name: str, kind: Any, params: Mapping[str, Any], extra: tuple[str, ...] = ()) -> None:
    check_signature(setting, name, kind, params, extra)
    _check_kinds(setting, name, kind, params)
    if "closure" in _needed(kind.step):
        raise ConfigError(f"{setting}.type", name, "it asks for the loss again within a step, and a stage cannot go back then",
                          "Take one that steps from gradients alone, such as SGD or AdamW.")
    matrix = nn.Parameter(torch.zeros(1, 2))
    try:
        optimizer = kind([matrix], **params)
        matrix.grad = torch.zeros_like(matrix)
        with suppress(RuntimeError):  # one for sparse gradients, say
            optimizer.step()
    except Exception as error:
        raise _refused(setting, name, params, error, lambda own: kind([nn.Parameter(torch.zeros(1, 2))], **own)) from error


def _needed(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(k for k, p in inspect.signature(function).parameters.items() if p.default is inspect.Parameter.empty)


def _check_kinds(setting: str, name: str, kind: Callable[..., Any], params: Mapping[str, Any]) -> None:
    """Numbers are finite, and no value is of another type than the default that it replaces: "false" would be true."""
    taken = _parameters_of(kind)
    for key, value in params.items():
        where = f"{setting}.params.{key}"
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise ConfigError(where, value, f"{name} takes finite numbers", "Give a number.")
        default = taken[key].default if key in taken else None
        if isinstance(value, str) and isinstance(default, bool | int | float):
            what = "true or false" if isinstance(default, bool) else "a number"
            raise ConfigError(where, value, f"{name} takes {what}", WITHOUT_QUOTES)
        if isinstance(value, bool) and isinstance(default, int | float) and not isinstance(default, bool):
            raise ConfigError(where, value, f"{name} takes a number", "Give the number.")


def _refused(setting: str, name: str, params: Mapping[str, Any], error: Exception,
             build: Callable[[dict[str, Any]], Any]) -> ConfigError:
    """The error, with the parameter that causes it where one alone does: without it, the same can be built."""
    guilty = None
    for key in params:
        try:
            build({k: v for k, v in params.items() if k != key})
        except Exception:
            continue
        guilty = key if guilty is None else ""  # more than one: none alone
    where = f"{setting}.params.{guilty}" if guilty else f"{setting}.params"
    value = params[guilty] if guilty else dict(params)
    hint = WITHOUT_QUOTES if isinstance(value, str) else f"See {name}'s documentation."
    return ConfigError(where, value, f"{name} does not take it ({type(error).__name__}: {error})", hint)


def check_scheduler(block: Mapping[str, Any], setting: str = "scheduler") -> None:
    """A ``scheduler`` block.

    Raises:
        ConfigError: naming the parameter, if there is no such scheduler or it does not take its parameters.
    """
    kind, params = type_and_params(setting, block, SCHEDULER_EXAMPLE)
    known = schedulers()
    if kind not in known:
        raise ConfigError(f"{setting}.type", kind, "neither DeepSpeed nor torch has an LR scheduler of this name; "
                          f"DeepSpeed has {', '.join(lr_schedules.VALID_LR_SCHEDULES)}",
                          near(kind, known, "Is it spelled right?"))
    if "params" not in block:
        raise ConfigError(f"{setting}.params", None, "DeepSpeed needs the object, even if it is empty", 'Add "params": {}.')
    _refuse_auto(setting, params)
    check_signature(setting, kind, known[kind], params)
    _check_kinds(setting, kind, known[kind], params)
    if "warmup_type" in params:
        one_of("log", "linear")(f"{setting}.params.warmup_type", params["warmup_type"])
    if any(isinstance(value, list | tuple) for value in params.values()) and kind not in ("MultiStepLR",):
        return  # one value for each group of the optimizer that will be there

    def build(own: dict[str, Any]) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1, 2))], lr=0.1, momentum=0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = known[kind](optimizer, **own)
            for _ in range(3):
                optimizer.step()
                scheduler.step()

    try:
        build(params)
    except Exception as error:
        raise _refused(setting, kind, params, error, build) from error


