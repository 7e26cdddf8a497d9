"""Blocks for which DeepSpeed has pydantic models, checked by these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.config import HybridEngineConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.blocks import refusal
from ds_decoupled.settings.kinds import WITHOUT_QUOTES, near

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
    "comms_logger": CommsLoggerConfig,
    "hybrid_engine": HybridEngineConfig,
    "compile": CompileConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}


def check_models(config: Mapping[str, Any]) -> None:
    """Each block of ``config`` that has a model. Raises :class:`ConfigError`, naming the setting in the block."""
    for path, model in MODELS.items():
        name, _, inner = path.partition(".")
        value = config.get(name)
        if inner and isinstance(value, Mapping):
            value = value.get(inner)
        if value is not None:
            if not isinstance(value, Mapping):
                raise ConfigError(path, value, 'an object such as {"enabled": true}', "Put its settings between { and }.")
            read_block(path, dict(value), model)


def read_block(path: str, value: dict[str, Any], model: type[BaseModel]) -> BaseModel:
    """``value`` as DeepSpeed's model. Raises :class:`ConfigError` where DeepSpeed's would be a raw ``ValidationError``."""
    known = {alias for name, field in model.model_fields.items() for alias in (name, field.alias) if alias}
    for key, given in value.items():
        if key not in known:
            raise ConfigError(f"{path}.{key}", given, f"there is no such setting in DeepSpeed's {path!r}",
                              near(key, known, "Leave it out."))
    try:
        parsed = model(**value)
    except ValidationError as error:
        raise refusal(path, model, value, error, "Mend it, or leave it out for DeepSpeed's default.") from error
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ConfigError(path, value, f"DeepSpeed does not take it ({type(error).__name__}: {error})",
                          "See DeepSpeed's documentation of this block.") from error
    for key, given in value.items():
        _check_type(f"{path}.{key}", given, getattr(parsed, _field_of(model, key), given))
    return parsed


def _field_of(model: type[BaseModel], key: str) -> str:
    return next((name for name, field in model.model_fields.items() if field.alias == key), key)


def _check_type(setting: str, given: Any, taken: Any) -> None:
    """DeepSpeed's models turn "1", true and 1 into one another; the rest of this package reads what stands in the JSON."""
    if isinstance(given, str) and isinstance(taken, bool | int | float) and given != "auto":
        raise ConfigError(setting, given, "true or false" if isinstance(taken, bool) else "a number", WITHOUT_QUOTES)
    if isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        raise ConfigError(setting, given, "a number", "Give the number.")
    if isinstance(taken, bool) and isinstance(given, int | float) and not isinstance(given, bool):
        raise ConfigError(setting, given, "true or false", "Give true or false.")
