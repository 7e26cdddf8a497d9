"""Checkpoints: weights, optimizers, and what is in flight.

::

    SAVE_DIR/latest                                     the newest tag
    SAVE_DIR/TAG/layer_00-model_states.pt               one file a layer, DeepSpeed's own format
    SAVE_DIR/TAG/loss_fn-model_states.pt                the loss's parameters and buffers, where it has any
    SAVE_DIR/TAG/decoupled_stage_00-data_00.pt          one file a stage and replica: optimizer, records, messages, codebooks
    SAVE_DIR/TAG/decoupled_engine.pt                    counters and the client's state

Nothing in it depends on the number of pipe ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from deepspeed import comm as dist

from ds_decoupled.axes import Axes
from ds_decoupled.collectives import agreed, gather, together
from ds_decoupled.compat import PipelineEngineBase
from ds_decoupled.links import Message
from ds_decoupled.network import Network
from ds_decoupled.runners import Runner
from ds_decoupled.schedules import Placement
from ds_decoupled.stages import LayerSeeds
from ds_decoupled.stages.worker import Worker
from ds_decoupled.tensors import on_device
from ds_decoupled.watchers import Watcher

_LOSS_FILE = "loss_fn-model_states.pt"


@dataclass(frozen=True)
class Parts:
    """What has a state of its own beside DeepSpeed's engine: this rank's, and what all ranks share."""

    method: str
    axes: Axes
    placement: Placement
    seeds: LayerSeeds
    workers: Mapping[int, Worker]
    network: Network
    runner: Runner
    watchers: Sequence[Watcher]


def _stage_file(folder: str, stage: int, replica: int) -> str:
    return os.path.join(folder, f"decoupled_stage_{stage:02d}-data_{replica:02d}.pt")


def save_checkpoint(engine: PipelineEngineBase, parts: Parts, save_dir: str, tag: Any, client_state: dict[str, Any],
                    save_latest: bool, exclude_frozen: bool) -> bool:
    """Write a checkpoint; see :meth:`DecoupledPipelineEngine.save_checkpoint`."""
    if not save_dir:
        raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
    # Ranks that wrote to different folders would leave two halves of a checkpoint, and say nothing.
    tags = gather(str(tag) if tag is not None else f"global_step{engine.global_steps}")
    if len(set(tags)) > 1:
        raise ValueError(f"save_checkpoint: the tag must be the same on every rank, got {sorted(set(tags))}")
    tag = tags[0]
    folder = os.path.join(save_dir, tag)
    os.makedirs(folder, exist_ok=True)
    with parts.runner.as_one():
        engine.module.save_state_dict(folder, checkpoint_engine=engine.checkpoint_engine, exclude_frozen_params=exclude_frozen)
    replica = engine.mpu.get_data_parallel_rank()
    if engine.is_last_stage() and replica == 0 and (loss_fn := _stateful_loss(engine)) is not None:
        torch.save(loss_fn.state_dict(), os.path.join(folder, _LOSS_FILE))
    pending, run = parts.network.pending(), parts.runner.state_dict()
    for index, worker in parts.workers.items():
        messages = {kind: [(m.micro_batch, m.parts) for m in queues[index]] for kind, queues in pending.items()}
        ring = parts.network.rings.get(index)
        torch.save({**_owned(worker.state_dict()), "pending": _owned(messages),
                    "codecs": parts.network.coding.state_dict(index),
                    "ring": None if ring is None else _owned(ring.state_dict())}, _stage_file(folder, index, replica))
    if engine.global_rank == 0:
        torch.save({"client_state": client_state, "stages": parts.placement.stages, "replicas": engine.dp_world_size,
                    "method": parts.method, "axes": asdict(parts.axes), "k": parts.runner.plan.k,
                    "stage_bounds": list(parts.placement.stage_bounds),
                    "global_steps": engine.global_steps, "global_samples": engine.global_samples,
                    "seed": parts.seeds.base, "run": run},
                   os.path.join(folder, "decoupled_engine.pt"))
    dist.barrier()
    if save_latest and engine.global_rank == 0:
        with open(os.path.join(save_dir, "latest"), "w") as file:
            file.write(tag)
    dist.barrier()
    return True


def load_checkpoint(engine: PipelineEngineBase, parts: Parts, load_dir: str, tag: Any, strict: bool, load_optimizer: bool,
                    load_lr_scheduler: bool, module_only: bool) -> tuple[str | None, dict[str, Any] | None]:
    """Read a checkpoint; see :meth:`DecoupledPipelineEngine.load_checkpoint`."""
    # What fails on one rank fails on all, and none goes on before all have loaded: a rank that runs free would send into a ring
    # that is about to be replaced.
    tag = agreed(lambda: (found := _tag(load_dir, tag), {"tag": found}), "checkpoint")
    if tag is None:
        return None, None
    folder = os.path.join(load_dir, tag)
    state = together(lambda: _engine_state(folder))
    if module_only:
        if not parts.runner.at_rest:
            raise RuntimeError("load_checkpoint(load_module_only=True) needs an empty pipeline, because the gradients that are "
                               "on their way are those of other weights: call drain() first")
        together(lambda: _load_weights(engine, folder, strict))
        for worker in parts.workers.values():
            worker.weights_replaced()
        return folder, state["client_state"]
    _check_same(engine, parts, folder, state)
    parts.network.pending()  # takes in what is on its way; it is of a run that ends here
    together(lambda: _load_all(engine, parts, folder, state, strict, load_optimizer, load_lr_scheduler))
    return folder, state["client_state"]


def _tag(load_dir: str, tag: Any) -> str | None:
    """``tag``, or by default the newest one; None where there is none."""
    if tag is not None:
        return str(tag)
    latest = os.path.join(load_dir, "latest")
    if not os.path.isfile(latest):
        return None
    with open(latest) as file:
        return file.read().strip()


def _engine_state(folder: str) -> dict[str, Any]:
    file = os.path.join(folder, "decoupled_engine.pt")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{folder} holds no checkpoint of a decoupled engine (decoupled_engine.pt is missing)")
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    return state


def _load_all(engine: PipelineEngineBase, parts: Parts, folder: str, state: Mapping[str, Any], strict: bool,
              load_optimizer: bool, load_lr_scheduler: bool) -> None:
    """This rank's weights, and all that is in flight."""
    _load_weights(engine, folder, strict)
    parts.seeds.base = state["seed"]  # before records are made again, with dropout's masks
    pending: dict[str, dict[int, list[Message]]] = {"activations": {}, "gradients": {}}
    rings: dict[int, Any] = {}
    codecs: dict[int, Any] = {}
    replica = engine.mpu.get_data_parallel_rank()
    for index, worker in parts.workers.items():
        saved = torch.load(_stage_file(folder, index, replica), map_location="cpu", weights_only=False)
        # Records are made again by a forward pass, in the mode that it ran in.
        engine.module.train()
        worker.load_state_dict(saved, load_optimizer, load_lr_scheduler)
        rings[index], codecs[index] = saved["ring"], saved["codecs"]
        for kind, messages in saved["pending"].items():
            pending[kind][index] = [Message(m, on_device(message, engine.device)) for m, message in messages]
    engine.global_steps, engine.global_samples = state["global_steps"], state["global_samples"]
    runner = parts.runner
    runner.load_state_dict(state["run"])
    for index, ring in parts.network.rings.items():
        ring.load_state_dict(rings[index])
    parts.network.restore(pending, runner.first, runner.sent_up())
    parts.network.coding.load_state_dict(codecs, engine.device)
    for watcher in parts.watchers:
        watcher.resumed(runner.next_micro_batch)


def _check_same(engine: PipelineEngineBase, parts: Parts, folder: str, state: Mapping[str, Any]) -> None:
    """What is in flight fits only the same stages, replicas, method and k.

    Raises:
        ValueError: naming what differs.
    """
    axes, told = asdict(parts.axes), state["axes"]
    saved_axes, own_axes = ("".join(f", {name} {of.get(name)}" for name in axes if told.get(name) != axes[name])
                            for of in (told, axes))
    compared = [("stages", state["stage_bounds"], list(parts.placement.stage_bounds)),
                ("data-parallel replicas", state["replicas"], engine.dp_world_size)]
    if own_axes:
        compared.append(("method", state["method"] + saved_axes, parts.method + own_axes))
    if not parts.runner.rests(state["run"]):
        compared.append(("k", state["k"], parts.runner.plan.k))
    for name, saved, here in compared:
        if saved != here:
            raise ValueError(f"the checkpoint {folder} was saved with {name} {saved}, this engine has {here}. What is in "
                             "flight fits only the same ones; load_module_only=True loads the weights alone.")


def _load_weights(engine: PipelineEngineBase, folder: str, strict: bool) -> None:
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


def _stateful_loss(engine: PipelineEngineBase) -> torch.nn.Module | None:
    """The pipeline module's ``loss_fn``, where it has parameters or buffers."""
    loss_fn = engine.module.loss_fn
    return loss_fn if isinstance(loss_fn, torch.nn.Module) and loss_fn.state_dict() else None


def _owned(value: Any) -> Any:
    """``value`` with tensors that own their storage: those that came by a link are views of one buffer, of several types."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _owned(v) for key, v in value.items()}
    return type(value)(_owned(v) for v in value) if isinstance(value, (tuple, list)) else value
