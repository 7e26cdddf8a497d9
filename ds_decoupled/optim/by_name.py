"""The JSON's optimizer: DeepSpeed's and torch's own by their names, any other by its import path.

::

    {"type": "Muon", "params": {"muon_lr": 2e-3, "adam_lr": 1e-3, "torch_adam": true}}    DeepSpeed's own
    {"type": "torch.optim.NAdam", "params": {"lr": 1e-3}}                                   any class that can be imported
    {"type": "pytorch_optimizer.SOAP", "params": {"lr": 3e-3}}                              pip install 'ds-decoupled[soap]'

Against delay the optimizer matters more than the method. DeepSpeed's Muon orthogonalizes the updates of matrices and gives
embeddings, heads (by their names: "embed", "lm_head") and vectors to AdamW; it bears delay best in ``docs/delay_study.md``.
SOAP runs Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321): of what is kept in a library it is the nearest
to basis rotation (arXiv 2602.03515), which rotates Adam's basis against delay and has no kept implementation known here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

from ds_decoupled.errors import ConfigError

OptimizerClass = Callable[..., torch.optim.Optimizer]

#: Parts of the names of optimizers that look at a parameter's rows and columns.
MATRIX_OPTIMIZERS = ("muon", "soap", "shampoo", "adafactor", "galore", "kron", "scion", "lbfgs")

TYPE, PARAMS = "optimizer.type", "optimizer.params"


def knows_optimizer(name: str) -> bool:
    """Whether DeepSpeed takes ``name`` as an optimizer's type."""
    return name.lower() in DEEPSPEED_OPTIMIZERS or hasattr(torch.optim, name)


def client_from_json(config: dict[str, Any]) -> Callable[[Any], torch.optim.Optimizer] | None:
    """What DeepSpeed is to call with the parameters; None where the JSON names no import path.

    Raises:
        ConfigError: if DeepSpeed, torch or the import path has no such optimizer, or it cannot work with the precision or
            the ZeRO stage that is set.
    """
    block = config.get("optimizer") or {}
    name, params = block.get("type"), dict(block.get("params") or {})
    if not isinstance(name, str):
        return None
    _check_flattened(config, name)
    if "." not in name:
        if not knows_optimizer(name):
            raise ConfigError(TYPE, name, "neither DeepSpeed nor torch.optim has an optimizer of this name",
                              'Give its import path, such as "pytorch_optimizer.SOAP".')
        return None
    kind = _import(name)

    def make(parameters: Any) -> torch.optim.Optimizer:
        try:
            return kind(parameters, **params)
        except (TypeError, ValueError) as error:
            raise ConfigError(PARAMS, params, f"{name} does not take them ({error})", "See its documentation.") from error

    return make


def _import(path: str) -> OptimizerClass:
    module_name, _, name = path.rpartition(".")
    package = module_name.partition(".")[0]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        wanted = error.name if isinstance(error, ModuleNotFoundError) and error.name else package
        hint = ("pip install 'ds-decoupled[soap]'" if wanted == "pytorch_optimizer"
                else f"pip install {wanted.partition('.')[0].replace('_', '-')}")
        raise ConfigError(TYPE, path, f"{module_name} cannot be imported ({error})",
                          f"If the package is missing, {hint}.") from error
    except ValueError as error:  # an empty part, as in "..x"
        raise ConfigError(TYPE, path, "an import path has the form package.module.Class",
                          'For example "torch.optim.NAdam".') from error
    kind = getattr(module, name, None)
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
        return kind
    if kind is not None:
        raise ConfigError(TYPE, path, "a subclass of torch.optim.Optimizer is needed, and this is none")
    near = difflib.get_close_matches(name, dir(module), n=1)
    raise ConfigError(TYPE, path, f"{module_name} has no {name!r}",
                      f'Did you mean "{module_name}.{near[0]}"?' if near else "Is the path right?")


def _check_flattened(config: dict[str, Any], name: str) -> None:
    """DeepSpeed's bf16 and ZeRO-1 optimizers hand the inner one a flat piece of all parameters: no rows, no columns."""
    bf16 = bool((config.get("bf16") or config.get("bfloat16") or {}).get("enabled"))
    zero = bool((config.get("zero_optimization") or {}).get("stage", 0))
    if not bf16 and not zero:
        return
    setting = "bf16.enabled" if bf16 else "zero_optimization.stage"
    value = True if bf16 else config["zero_optimization"]["stage"]
    short = name.rpartition(".")[2]
    if name.lower() == "muon" and not bf16:
        return  # DeepSpeed's ZeRO-1 puts its own Muon's matrices together again
    if any(part in short.lower() for part in MATRIX_OPTIMIZERS):
        raise ConfigError(setting, value, f"it flattens the parameters, and {name} needs them as matrices",
                          'Take float32 without ZeRO, or an element-wise optimizer such as "AdamW".')
    if "." in name and not name.startswith("torch.optim.") and not config.get("zero_allow_untested_optimizer"):
        raise ConfigError(setting, value, f"it flattens the parameters, and whether {name} minds is not known here",
                          'If it is element-wise, set "zero_allow_untested_optimizer": true.')
