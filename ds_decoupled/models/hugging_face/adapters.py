"""LoRA and the like through ``peft``: added to one part at a time, merged or saved from the parts of all ranks."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ds_decoupled.errors import ConfigError

_ADAPTER = "default"


def add_adapters(root: nn.Module, peft_config: Any, model_config: Any) -> None:
    """Freeze everything under ``root``, and inject adapters where ``peft_config`` finds its target modules.

    Parts named by ``modules_to_save`` are trained as a whole.
    """
    from peft import inject_adapter_in_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    config = copy.deepcopy(peft_config)
    if config.target_modules is None:
        if model_config.model_type not in TARGETS:
            raise ConfigError("peft_config.target_modules", None, f"peft knows no targets for models of type "
                              f"{model_config.model_type!r}", "Name them, or take 'all-linear'.")
        config.target_modules = TARGETS[model_config.model_type]
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    if _has_target(root, config):
        inject_adapter_in_model(config, root)
    for path, module in root.named_modules():
        if path.rpartition(".")[2] in (config.modules_to_save or ()):
            module.requires_grad_(True)


def _has_target(root: nn.Module, config: Any) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.target_modules == "all-linear":
        # As peft has it: every linear layer but the unembedding. Here a decoder layer has some, the ends have none.
        names = {path.rpartition(".")[2] for path, module in root.named_modules()
                 if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"}
        ends = [path for path, module in root.named_modules() if path.count(".") == 0 and isinstance(module, nn.Linear)]
        config.target_modules = sorted(names - set(ends))
    return any(check_target_module_exists(config, path) for path, _ in root.named_modules())


def merged(root: nn.Module) -> dict[str, Tensor]:
    """The weights under ``root`` by their original names, with adapters added in; nothing is changed."""
    adapted = {path: module for path, module in root.named_modules() if hasattr(module, "get_delta_weight")}
    values = {}
    for name, value in root.state_dict().items():
        path, _, own = name.rpartition(".")
        if path.endswith(".base_layer"):
            layer = path.removesuffix(".base_layer")
            if own == "weight":
                value = value + adapted[layer].get_delta_weight(_ADAPTER).to(value.dtype)
            values[f"{layer}.{own}"] = value
        elif not any(name.startswith(f"{layer}.") for layer in adapted):
            values[name] = value
    return values


def adapters(root: nn.Module) -> dict[str, Tensor]:
    """What training may have changed under ``root``, by the names that a saved ``PeftModel`` has."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = {}
    if hasattr(root, "peft_config"):
        found = get_peft_model_state_dict(root, adapter_name=_ADAPTER)
    found |= {name: p for name, p in root.named_parameters() if p.requires_grad and "lora_" not in name}
    return {f"base_model.model.{name}": value.detach() for name, value in found.items()}
