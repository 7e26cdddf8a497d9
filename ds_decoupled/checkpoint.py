"""Checkpoints: weights, optimizers, and what is in flight.

::

    SAVE_DIR/latest                                     the newest tag
    SAVE_DIR/TAG/layer_00-model_states.pt               one file a layer, DeepSpeed's own format
    SAVE_DIR/TAG/loss_fn-model_states.pt                the loss's parameters and buffers, where it has any
    SAVE_DIR/TAG/decoupled_stage_00-data_00.pt          one file a stage and replica: optimizer, records, messages on their way
    SAVE_DIR/TAG/decoupled_engine.pt                    counters and the client's state

Nothing in it depends on the number of pipe ranks.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist

from ds_decoupled.collectives import gather
from ds_decoupled.links import Message

if TYPE_CHECKING:
    from ds_decoupled.engine import DecoupledPipelineEngine


_LOSS_FILE = "loss_fn-model_states.pt"


def _stage_file(folder: str, stage: int, replica: int) -> str:
    return os.path.join(folder, f"decoupled_stage_{stage:02d}-data_{replica:02d}.pt")


def save_checkpoint(engine: DecoupledPipelineEngine, save_dir: str, tag: Any, client_state: dict[str, Any],
                    save_latest: bool, exclude_frozen: bool) -> bool:
    """Write a checkpoint; see :meth:`DecoupledPipelineEngine.save_checkpoint`."""
    if not save_dir:
        raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
    tags = gather(str(tag) if tag is not None else f"global_step{engine.global_steps}")
    if len(set(tags)) > 1:
        raise ValueError(f"save_checkpoint: the tag must be the same on every rank, got {sorted(set(tags))}")
    tag = tags[0]
    folder = os.path.join(save_dir, tag)
    os.makedirs(folder, exist_ok=True)
    engine.module.save_state_dict(folder, checkpoint_engine=engine.checkpoint_engine, exclude_frozen_params=exclude_frozen)
    replica = engine.mpu.get_data_parallel_rank()
    if engine.holds_loss and replica == 0 and (loss_fn := _stateful_loss(engine)) is not None:
        torch.save(loss_fn.state_dict(), os.path.join(folder, _LOSS_FILE))
    pending = engine.network.pending()
    for index, stage in engine.stages.items():
        messages = {kind: [(m.micro_batch, m.parts) for m in queues[index]] for kind, queues in pending.items()}
        torch.save({"stage": _owned(stage.state_dict()), "optimizer": engine.stage_optimizers[index].state_dict(),
                    "pending": _owned(messages)}, _stage_file(folder, index, replica))
    if engine.global_rank == 0:
        torch.save({"client_state": client_state, "stages": engine.placement.stages, "replicas": engine.dp_world_size,
                    "method": engine.decoupled.method, "axes": asdict(engine.axes), "k": engine.plan.k,
                    "stage_bounds": list(engine.placement.stage_bounds),
                    "global_steps": engine.global_steps, "global_samples": engine.global_samples,
                    "seed": engine.seeds.base, "run": (engine._first_micro_batch, engine._fed, engine._tick)},
                   os.path.join(folder, "decoupled_engine.pt"))
    dist.barrier()
    if save_latest and engine.global_rank == 0:
        with open(os.path.join(save_dir, "latest"), "w") as file:
            file.write(tag)
    dist.barrier()
    return True


def load_checkpoint(engine: DecoupledPipelineEngine, load_dir: str, tag: Any, strict: bool, load_optimizer: bool,
                    load_lr_scheduler: bool, module_only: bool) -> tuple[str | None, dict[str, Any] | None]:
    """Read a checkpoint; see :meth:`DecoupledPipelineEngine.load_checkpoint`."""
    if tag is None:
        latest = os.path.join(load_dir, "latest")
        if not os.path.isfile(latest):
            return None, None
        with open(latest) as file:
            tag = file.read().strip()
    folder = os.path.join(load_dir, str(tag))
    if not os.path.isfile(os.path.join(folder, "decoupled_engine.pt")):
        raise FileNotFoundError(f"{folder} holds no checkpoint of a decoupled engine (decoupled_engine.pt is missing)")
    state = torch.load(os.path.join(folder, "decoupled_engine.pt"), map_location="cpu", weights_only=False)
    if module_only:
        if engine._tick:
            raise RuntimeError("load_checkpoint(load_module_only=True) needs an empty pipeline, because the gradients that are "
                               "on their way are those of other weights: call drain() first")
        _load_weights(engine, folder, strict)
        for optimizer in engine.stage_optimizers.values():
            optimizer.weights_replaced()
        return folder, state["client_state"]
    axes, in_flight = asdict(engine.axes), state["run"][2] > 0
    told = state.get("axes", axes)  # older checkpoints do not tell
    saved_axes, own_axes = ("".join(f", {name} {of.get(name)}" for name in axes if told.get(name) != axes[name])
                            for of in (told, axes))
    for name, saved, here in (("stages", state["stage_bounds"], list(engine.placement.stage_bounds)),
                              ("data-parallel replicas", state["replicas"], engine.dp_world_size),
                              *([("method", state["method"] + saved_axes, engine.decoupled.method + own_axes)]
                                if own_axes else []),
                              *([("k", state.get("k", engine.plan.k), engine.plan.k)] if in_flight else [])):
        if saved != here:
            raise ValueError(f"the checkpoint {folder} was saved with {name} {saved}, this engine has {here}. What is in "
                             "flight fits only the same ones; load_module_only=True loads the weights alone.")
    engine.network.pending()  # takes in what is on its way; it is of a run that ends here
    _load_weights(engine, folder, strict)
    engine.seeds.base = state["seed"]  # before records are made again, with dropout's masks
    pending: dict[str, dict[int, list[Message]]] = {"activations": {}, "gradients": {}}
    replica = engine.mpu.get_data_parallel_rank()
    for index, stage in engine.stages.items():
        saved = torch.load(_stage_file(folder, index, replica), map_location="cpu", weights_only=False)
        engine.stage_optimizers[index].load_state_dict(saved["optimizer"], load_optimizer, load_lr_scheduler)
        engine.module.train()
        stage.load_state_dict(saved["stage"])
        for kind, messages in saved["pending"].items():
            pending[kind][index] = [Message(m, _on(parts, engine.device)) for m, parts in messages]
    engine.global_steps, engine.global_samples = state["global_steps"], state["global_samples"]
    engine._first_micro_batch, engine._fed, engine._tick = state["run"]
    engine._end = engine._end_error = None
    engine._batches.clear()
    engine.network.restore(pending, engine._tick, engine._fed, engine._first_micro_batch)
    if engine.tracker is not None:
        engine.tracker.forget(engine._first_micro_batch + engine._fed)
    return folder, state["client_state"]


def _load_weights(engine: DecoupledPipelineEngine, folder: str, strict: bool) -> None:
    """The layers' weights, and the loss's."""
    engine.module.load_state_dir(folder, checkpoint_engine=engine.checkpoint_engine, strict=strict)
    if (loss_fn := _stateful_loss(engine)) is None:
        return
    path = os.path.join(folder, _LOSS_FILE)
    if os.path.isfile(path):
        loss_fn.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=strict)
    elif strict:
        raise FileNotFoundError(f"loss_fn has parameters or buffers, and {folder} holds none of them ({_LOSS_FILE} is "
                                "missing); load_module_strict=False leaves them as they are")


def _stateful_loss(engine: DecoupledPipelineEngine) -> torch.nn.Module | None:
    """The pipeline module's ``loss_fn``, where it has parameters or buffers."""
    loss_fn = engine.module.loss_fn
    return loss_fn if isinstance(loss_fn, torch.nn.Module) and loss_fn.state_dict() else None


def _on(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(_on(v, device) for v in value) if isinstance(value, tuple) else value


def _owned(value: Any) -> Any:
    """``value`` with tensors that own their storage: those that came by a link are views of one buffer, of several types."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _owned(v) for key, v in value.items()}
    return type(value)(_owned(v) for v in value) if isinstance(value, (tuple, list)) else value
