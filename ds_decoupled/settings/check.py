"""All of DeepSpeed's own settings, looked at before DeepSpeed sees them.

Three nets, each finer than what DeepSpeed says itself: the tables of this folder; what ``optimizer`` and ``scheduler`` build;
and, for what is in no table, DeepSpeed's own reading of the configuration, whose raw errors are given the name of a setting.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from ds_decoupled.collectives import flat
from ds_decoupled.config import BLOCK, DecoupledConfig
from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.kinds import check_object
from ds_decoupled.settings.table import SIZES, check_table
from ds_decoupled.settings.unsupported import check_supported

#: Packages that a monitor imports when DeepSpeed makes it, which it does on rank 0 alone (``deepspeed/monitor``).
MONITORS = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb"),
            "comet": ("comet_ml", "comet_ml")}


def check_settings(config: Mapping[str, Any], decoupled: bool) -> None:
    """DeepSpeed's settings of a configuration.

    Args:
        config: as :func:`ds_decoupled.settings.read_json` gives it.
        decoupled: whether a decoupled engine will run it; if not, DeepSpeed's own, which heeds all of them.

    Raises:
        ConfigError: naming the setting, its value, what is allowed and what to do.
    """
    from ds_decoupled.settings.built import check_optimizer, check_scheduler
    from ds_decoupled.settings.models import check_models

    check_object("deepspeed_config", config, '{"train_micro_batch_size_per_gpu": 8}')
    check_table(config)
    check_models(config)
    if "optimizer" in config:
        check_optimizer(config["optimizer"])
    if "scheduler" in config:
        check_scheduler(config["scheduler"])
    _check_monitors(config)
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if stage >= 2:
        raise ConfigError("zero_optimization.stage", stage, "0 and 1 work with pipelines: higher stages partition gradients "
                          "that a pipeline accumulates", "Take stage 1.")
    if decoupled:
        check_supported(config)
    _check_precision(config)


def _on(config: Mapping[str, Any], name: str) -> bool:
    return bool((config.get(name) or {}).get("enabled"))


def _check_precision(config: Mapping[str, Any]) -> None:
    from deepspeed.accelerator import get_accelerator

    if "bf16" in config and "bfloat16" in config:
        raise ConfigError("bfloat16", config["bfloat16"], 'it is the old name of "bf16", which is there too', "Leave it out.")
    accelerator = get_accelerator()
    for name, works in (("fp16", accelerator.is_fp16_supported), ("bf16", accelerator.is_bf16_supported),
                        ("bfloat16", accelerator.is_bf16_supported)):
        if _on(config, name) and not works():
            raise ConfigError(f"{name}.enabled", True, f"the device, {accelerator.device_name()}, does not support it here",
                              "Leave it out for float32.")
    if _on(config, "fp16") and (_on(config, "bf16") or _on(config, "bfloat16")):
        raise ConfigError("fp16.enabled", True, "a model is in one type, and bf16 is enabled too", "Leave one of the two out.")


def _check_monitors(config: Mapping[str, Any]) -> None:
    for name, (module, package) in MONITORS.items():
        if not _on(config, name):
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"{name}.enabled", True, f"it needs the package {package}, which cannot be imported ({error})",
                              f"pip install {package}, or leave it out.") from error
    for name in ("tensorboard", "csv_monitor"):
        if _on(config, name):
            _check_folder(f"{name}.output_path", config[name].get("output_path", ""))


def _check_folder(setting: str, path: str) -> None:
    """A folder that can be made there: the first of its parents that exists is one, and may be written."""
    folder = os.path.abspath(path or ".")
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        what = "no folder" if not os.path.isdir(folder) else "not to be written"
        raise ConfigError(setting, path, f"a folder that can be written is needed, and {folder} is {what}", "Give another one.")


def as_deepspeed_reads_it(config: dict[str, Any], mpu: Any) -> None:
    """Let DeepSpeed read ``config``; no collective call.

    Raises:
        ConfigError: in place of whatever it raises, naming the block that it does not raise without.
    """
    try:
        _read(config, mpu)
    except Exception as error:
        for key in config:
            if key not in SIZES and _raises({name: config[name] for name in (*SIZES, key) if name in config}, mpu):
                raise ConfigError(key, config[key], f"DeepSpeed does not take it ({type(error).__name__}: {error})",
                                  "See https://www.deepspeed.ai/docs/config-json/.") from error
        raise ConfigError("deepspeed_config", sorted(config), "DeepSpeed does not take these together "
                          f"({type(error).__name__}: {error})", "See https://www.deepspeed.ai/docs/config-json/.") from error


def _read(config: dict[str, Any], mpu: Any) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    DeepSpeedConfig(dict(config), mpu)


def _raises(config: dict[str, Any], mpu: Any) -> bool:
    try:
        _read(config, mpu)
    except Exception:
        return True
    return False


#: What may differ between ranks: it names places on a machine, or how much a rank says.
OF_A_RANK = ("tensorboard", "wandb", "csv_monitor", "comet", "log_level", "dump_state", "steps_per_print")


def comparable(config: Mapping[str, Any], block: DecoupledConfig | None) -> dict[str, Any]:
    """What must be the same on every rank, by name."""
    shared = {key: value for key, value in config.items() if key not in (*OF_A_RANK, BLOCK) and not key.startswith("_")}
    return flat(shared | ({BLOCK: block.model_dump(mode="json")} if block is not None else {}))
