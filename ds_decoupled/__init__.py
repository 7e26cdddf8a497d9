"""Decoupled pipelines for DeepSpeed: reversible stages, delayed gradients, stage-local losses, behind one JSON block.

>>> import ds_decoupled
>>> engine, *_ = ds_decoupled.initialize(model=model, config="ds_configs/petra.json")        # doctest: +SKIP

Names load when they are first used, so that plans can be drawn without torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_decoupled.config import DecoupledConfig
    from ds_decoupled.engine import DecoupledPipelineEngine
    from ds_decoupled.entry import initialize
    from ds_decoupled.errors import ConfigError, LinkError, PlanError
    from ds_decoupled.module import DecoupledPipelineModule
    from ds_decoupled.nn import ReversibleCoupling, mark_block

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "errors",
    "DecoupledConfig": "config",
    "DecoupledPipelineEngine": "engine",
    "DecoupledPipelineModule": "module",
    "LinkError": "errors",
    "PlanError": "errors",
    "ReversibleCoupling": "nn",
    "initialize": "entry",
    "mark_block": "nn",
}

__all__ = ["ConfigError", "DecoupledConfig", "DecoupledPipelineEngine", "DecoupledPipelineModule", "LinkError", "PlanError",
           "ReversibleCoupling", "initialize", "mark_block"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):  # ds_decoupled.nn.mark_block, as a user writes it
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
