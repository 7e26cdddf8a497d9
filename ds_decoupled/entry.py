"""The way in: ``deepspeed.initialize``, with the ``decoupled`` block of the configuration heeded."""

from __future__ import annotations

from functools import partial
from typing import Any

import deepspeed
from deepspeed.pipe import PipelineModule

from ds_decoupled import compat
from ds_decoupled.config import BLOCK, DecoupledConfig, parse_block, read_json
from ds_decoupled.engine import DecoupledPipelineEngine
from ds_decoupled.errors import ConfigError
from ds_decoupled.module import placement_of
from ds_decoupled.optim import client_from_json


def initialize(args: Any = None, model: Any = None, optimizer: Any = None, model_parameters: Any = None,
               training_data: Any = None, lr_scheduler: Any = None, distributed_port: int = 29500, mpu: Any = None,
               dist_init_required: bool | None = None, collate_fn: Any = None, config: Any = None, mesh_param: Any = None,
               config_params: Any = None) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize``: the same arguments, the same ``(engine, optimizer, dataloader, lr_scheduler)``.

    Without a ``decoupled`` block in the configuration it is exactly that. With one, ``model`` must be a
    :class:`~ds_decoupled.DecoupledPipelineModule` or a plain ``PipelineModule``, and the engine is a
    :class:`~ds_decoupled.DecoupledPipelineEngine`; but ``"method": "backprop"`` is 1F1B and is left to DeepSpeed's own engine.
    The optimizer's ``type`` may then also be an import path (:mod:`ds_decoupled.optim.by_name`).

    Raises:
        ConfigError: for settings that cannot work, on every rank.
    """
    call = partial(deepspeed.initialize, args=args, model=model, optimizer=optimizer, model_parameters=model_parameters,
                   training_data=training_data, lr_scheduler=lr_scheduler, distributed_port=distributed_port, mpu=mpu,
                   dist_init_required=dist_init_required, collate_fn=collate_fn, config=config, mesh_param=mesh_param,
                   config_params=config_params)
    if isinstance(model, PipelineModule):
        compat.wait_for_all()
    source = next((c for c in (config, config_params, getattr(args, "deepspeed_config", None)) if c is not None), None)
    block = parse_block(source) if source is not None else None
    if block is None or source is None:
        return call()
    if not isinstance(model, PipelineModule):
        raise ConfigError("model", type(model).__name__, f'with a "{BLOCK}" block the model must be a pipeline',
                          "Make a ds_decoupled.DecoupledPipelineModule of its layers.")
    _check_batch(read_json(source), model.mpu().get_data_parallel_world_size())
    if optimizer is None:
        call = partial(call, optimizer=client_from_json(read_json(source)))
    if block.is_plain_backprop:
        compat.clip_over_all_stages(model)
        return call()
    _check(read_json(source), block, model)
    placement = placement_of(model, block.stages)
    compat.norms_within_stages(model)
    with compat.engine_class(partial(DecoupledPipelineEngine, decoupled=block, placement=placement)):
        return call()


def _check(config: dict[str, Any], block: DecoupledConfig, model: PipelineModule) -> None:
    """Refuse what the decoupled engine cannot do, before anything is built."""
    axes = block.axes()
    zero = (config.get("zero_optimization") or {}).get("stage", 0)
    if zero >= 2:
        raise ConfigError("zero_optimization.stage", zero, "0 and 1 work with pipelines: higher stages partition gradients "
                          "that a pipeline accumulates", "Take stage 1.")
    if (config.get("fp16") or {}).get("enabled"):
        why = ("the loss scale of a delayed gradient is not the one in force when it arrives, and an overflow would undo "
               "the updates of stages that have stepped already" if not axes.flush else
               "stages that step on their own agree on no common loss scale")
        raise ConfigError("fp16.enabled", True, why, 'Take "bf16" or float32.')
    tied = compat.tied_keys(model)
    if tied and not axes.flush:
        raise ConfigError(f"{BLOCK}.update", "delayed", f"layers tied by {', '.join(map(repr, tied))} would drift apart: their "
                          "stages step at different times", "Untie them (from_hugging_face(..., untie_embeddings=True)), or "
                          'take "method": "backprop".')
    if tied and axes.flush:
        raise ConfigError(f"{BLOCK}.method", block.method, f"tied layers ({', '.join(map(repr, tied))}) need DeepSpeed's own "
                          "engine", 'Take "method": "backprop", or untie them (from_hugging_face(..., untie_embeddings=True)).')


def _check_batch(config: dict[str, Any], replicas: int) -> None:
    """Batch settings that do not go into one another."""
    total, micro, k = (config.get(name) for name in ("train_batch_size", "train_micro_batch_size_per_gpu",
                                                     "gradient_accumulation_steps"))
    if not isinstance(total, int):
        return
    parts = [n for n in (micro, k) if isinstance(n, int)]
    product = replicas
    for part in parts:
        product *= part
    if total != product if len(parts) == 2 else total % product:
        given = f"train_micro_batch_size_per_gpu x gradient_accumulation_steps x replicas = {micro} x {k} x {replicas}"
        raise ConfigError("train_batch_size", total, f"{given} must make it up", "Leave one of the three out, or mend it.")
