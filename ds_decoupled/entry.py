"""The way in: ``deepspeed.initialize``, which also reads the ``decoupled`` block of the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
from deepspeed.pipe import PipelineModule
from torch.optim import Optimizer

from ds_decoupled import compat
from ds_decoupled.collectives import agreed
from ds_decoupled.config import BLOCK, DecoupledConfig, block_of, read_json
from ds_decoupled.engine import DecoupledPipelineEngine
from ds_decoupled.errors import ConfigError
from ds_decoupled.flushed import as_flushed
from ds_decoupled.module import DecoupledPipelineModule, placement_of, tied_keys
from ds_decoupled.optim import client_from_json
from ds_decoupled.settings.built import WITHOUT_RATE, check_scheduler
from ds_decoupled.settings.check import as_deepspeed_reads_it, check_settings, comparable
from ds_decoupled.settings.table import batch_sizes
from ds_decoupled.settings.unsupported import check_checkpoint_interval
from ds_decoupled.shared_memory import release_names


def initialize(args: Any = None, model: Any = None, optimizer: Any = None, model_parameters: Any = None,
               training_data: Any = None, lr_scheduler: Any = None, distributed_port: int = 29500, mpu: Any = None,
               dist_init_required: bool | None = None, collate_fn: Any = None, config: Any = None, mesh_param: Any = None,
               config_params: Any = None) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize``: the same arguments, the same ``(engine, optimizer, dataloader, lr_scheduler)``.

    Without a ``decoupled`` block in the configuration it is exactly that. With one, ``model`` must be a
    :class:`~ds_decoupled.DecoupledPipelineModule` or a plain ``PipelineModule``, and the engine is a
    :class:`~ds_decoupled.DecoupledPipelineEngine`; but ``"method": "backprop"`` is 1F1B and is left to DeepSpeed's own engine
    (:class:`~ds_decoupled.flushed.FlushedPipelineEngine`). Either answers ``drain``, ``decoupled_summary``, ``stage_metrics``.
    The optimizer's ``type`` may then also be an import path (:mod:`ds_decoupled.optim.by_name`), and DeepSpeed's own settings
    are checked before it sees them (:mod:`ds_decoupled.settings`).

    Raises:
        ConfigError: for settings that cannot work, or that differ between ranks; on every rank.
        RankError: on the other ranks, if something else fails on one while the engine is made.
    """
    given = {"args": args, "model": model, "optimizer": optimizer, "model_parameters": model_parameters,
             "training_data": training_data, "lr_scheduler": lr_scheduler, "distributed_port": distributed_port, "mpu": mpu,
             "dist_init_required": dist_init_required, "collate_fn": collate_fn, "config": config, "mesh_param": mesh_param,
             "config_params": config_params}
    # A collective call, before anything that one rank alone may fail at.
    weights = compat.built_parameters(model) if isinstance(model, PipelineModule) else []
    read = partial(_read, given, weights)
    setup = agreed(read, "configuration") if isinstance(model, PipelineModule) else read()[0]
    if setup is None:
        return deepspeed.initialize(**given)
    settings, block = setup
    # Every rank has mapped the others' all-reduce buffers by now; their names would outlive a process that is killed.
    release_names()
    given |= {"config": settings, "config_params": None}
    if optimizer is None:
        given["optimizer"] = client_from_json(settings)
    with _config_of_args_aside(args):
        if block.is_plain_backprop:
            compat.clip_over_all_stages(model)
            with compat.engine_class(compat.GuardedPipelineEngine):
                engine, *rest = deepspeed.initialize(**given)
            return as_flushed(engine), *rest
        placement = placement_of(model, block.stages, weights)
        compat.norms_within_stages(model)
        with compat.engine_class(partial(DecoupledPipelineEngine, decoupled=block, placement=placement)):
            return deepspeed.initialize(**given)


Setup = tuple[dict[str, Any], DecoupledConfig]


def _read(given: Mapping[str, Any], weights: list[float]) -> tuple[Setup | None, dict[str, Any]]:
    """The configuration and its block, checked as far as one rank can by itself, and what must be the same on all ranks; None
    and nothing where there is no block."""
    source = next((s for s in (given["config"], given["config_params"], *_of_args(given["args"])) if s is not None), None)
    config = read_json(source) if source is not None else {}
    block = block_of(config)
    if block is None:
        return None, {}
    _check_arguments(given)
    check_settings(config, decoupled=not block.is_plain_backprop)
    model: PipelineModule = given["model"]
    _check_stage_schedulers(block)
    # A plain module has been cut before it came here: into ranks, which for DeepSpeed's own engine are the stages too.
    for name in ("partition", *(["stages"] if block.is_plain_backprop and block.stages != model.num_stages else [])):
        value = getattr(block, name)
        if value != DecoupledConfig.model_fields[name].default and not isinstance(model, DecoupledPipelineModule):
            raise ConfigError(f"{BLOCK}.{name}", value, "a plain PipelineModule has cut its layers by its own "
                              "partition_method", "Leave it out, or make a ds_decoupled.DecoupledPipelineModule.")
    batch_sizes(config, model.mpu().get_data_parallel_world_size())
    if given["optimizer"] is None:
        client_from_json(config)
    as_deepspeed_reads_it(config, model.mpu())
    if not block.is_plain_backprop:
        _check(config, block, model)
        placement_of(model, block.stages, weights)
    clients = {name: _kind(given[name]) for name in ("optimizer", "lr_scheduler")}
    return (config, block), comparable(config, block) | clients


def _of_args(args: Any) -> tuple[Any, ...]:
    """The configuration that the script's arguments name, under both of DeepSpeed's names for it."""
    return getattr(args, "deepspeed_config", None), getattr(args, "deepscale_config", None)


@contextmanager
def _config_of_args_aside(args: Any) -> Iterator[None]:
    """DeepSpeed takes a configuration from the arguments or from ``config``, and not from both."""
    names = [name for name in ("deepspeed_config", "deepscale_config") if getattr(args, name, None) is not None]
    before = {name: getattr(args, name) for name in names}
    try:
        for name in names:
            setattr(args, name, None)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def _check_arguments(given: Mapping[str, Any]) -> None:
    model = given["model"]
    if not isinstance(model, PipelineModule):
        raise ConfigError("model", type(model).__name__, f'with a "{BLOCK}" block the model must be a pipeline',
                          "Make a ds_decoupled.DecoupledPipelineModule of its layers.")
    if given["mpu"] is not None:
        raise ConfigError("mpu", type(given["mpu"]).__name__, "a pipeline brings its own", "Leave it out.")
    sources = [s for s in (given["config"] or given["config_params"], *_of_args(given["args"])) if s is not None]
    if len(sources) > 1:
        raise ConfigError("config", "given twice", "the script's arguments name a configuration, and the call gives one",
                          "Give one of them.")


def _kind(client: Any) -> str | None:
    """What the script gave as an optimizer or a scheduler, in words that are the same on every rank."""
    if client is None:
        return None
    return type(client).__qualname__ if isinstance(client, Optimizer) or not hasattr(client, "__qualname__") else "a callable"


def _check_stage_schedulers(block: DecoupledConfig) -> None:
    for stage, scheduler in enumerate(block.stage_schedulers or ()):
        if scheduler is not None:
            check_scheduler({"params": {}, **scheduler}, f"{BLOCK}.stage_schedulers[{stage}]")


def _check(config: dict[str, Any], block: DecoupledConfig, model: PipelineModule) -> None:
    """Refuse what the decoupled engine cannot do, before anything is built."""
    axes = block.axes()
    check_checkpoint_interval(model.activation_checkpoint_interval)
    rate_free = (config.get("optimizer") or {}).get("type") in WITHOUT_RATE
    for name in ("stage_lr", "lr_by_delay"):
        if rate_free and getattr(block, name):
            raise ConfigError(f"{BLOCK}.{name}", getattr(block, name), f"{config['optimizer']['type']} does not step in "
                              "proportion to its learning rate", "Leave it out, or take another optimizer.")
    tied = tied_keys(model)
    if tied and not axes.flush:
        raise ConfigError(f"{BLOCK}.update", "delayed", f"layers tied by {', '.join(map(repr, tied))} would drift apart: their "
                          "stages step at different times", "Untie them (from_hugging_face(..., untie_embeddings=True)), or "
                          'take "method": "backprop".')
    if tied and axes.flush:
        raise ConfigError(f"{BLOCK}.method", block.method, f"tied layers ({', '.join(map(repr, tied))}) need DeepSpeed's own "
                          "engine", 'Take "method": "backprop", or untie them (from_hugging_face(..., untie_embeddings=True)).')
