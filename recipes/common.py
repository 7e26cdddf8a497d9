"""What the recipes share: starting and stopping processes, learning-rate schedules, the summary and its picture."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from failures import NoticeBoard, program
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ds_decoupled.collectives import from_rank as from_rank
from ds_decoupled.collectives import together as together
from ds_decoupled.config import parse_block, read_json
from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.check import check_settings
from ds_decoupled.settings.table import batch_sizes as batch_sizes
from ds_decoupled.shared_memory import release_names

T = TypeVar("T")


@contextmanager
def distributed(backend: str | None) -> Iterator[None]:
    """Join the processes that the launcher started (or run alone), and leave cleanly.

    A setting that cannot work ends every process with its message, whichever rank found it (:mod:`failures`); Ctrl-C ends
    without one.
    """
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if accelerator.device_name() != "cpu":
        # With fewer devices than processes (and gloo) several share one; DeepSpeed reads the device from here.
        os.environ["LOCAL_RANK"] = str(local_rank % accelerator.device_count())
        accelerator.set_device(local_rank % accelerator.device_count())
    elif "OMP_NUM_THREADS" not in os.environ:
        # Every process would take all cores, and they would take turns.
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    board: NoticeBoard | None = None
    try:
        _check_backend(backend)
        deepspeed.init_distributed(dist_backend=backend, rank=int(os.environ["RANK"]))
        release_names()
        board = NoticeBoard()
        yield
        dist.barrier()
        board.leave()
        dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if board is not None:
            board.end(error)
        elif isinstance(error, ConfigError):
            sys.exit(f"{program()}: {error}")
        raise


def _check_backend(backend: str | None) -> None:
    if backend is None:
        return
    known = [name for name in dist.Backend.backend_list
             if name not in ("undefined", "fake") and dist.is_backend_available(name)]
    if backend not in known:
        raise ConfigError("--backend", backend, f"torch.distributed has {', '.join(known)} here", "Leave it out")
    if backend == "nccl" and get_accelerator().device_name() != "cuda":
        raise ConfigError("--backend", backend, "it moves tensors of GPUs, and there are none here", "Take gloo")


def evaluate(engine: Any, batches: Iterator[Any] | None, count: int, compute_loss: bool = True) -> list[Tensor] | None:
    """What the last stage makes of ``count`` micro-batches: losses, or outputs; a collective call.

    Args:
        batches: on the ranks of the first and the last stage.

    Returns:
        One value a micro-batch on the ranks of the last stage, None elsewhere.
    """
    # DeepSpeed adds what the last stage gives to the loss that the last train_batch left there, and the shapes may differ.
    engine.total_loss = None
    engine.reset_activation_shape()  # DeepSpeed's ranks tell each other shapes with the first message alone
    results = engine.eval_batch(batches, compute_loss=compute_loss, reduce_output=None, bcast_loss=False,
                                num_micro_batches=count)
    engine.reset_activation_shape()
    return None if results is None else list(results)


def largest(value: int) -> int:
    """The largest ``value`` of all ranks."""
    values = [0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return max(values)


def pipe_position(pipe_ranks: int | None) -> tuple[int, int, int, int]:
    """``(pipe_ranks, pipe rank, replicas, replica)`` of this process; the replicas of a stage are neighbours."""
    world = dist.get_world_size()
    ranks = world if pipe_ranks is None else pipe_ranks
    if ranks < 1 or world % ranks:
        raise ConfigError("--pipe_ranks", ranks, f"it must divide the number of processes, which is {world}")
    replicas = world // ranks
    pipe_rank, replica = divmod(dist.get_rank(), replicas)
    return ranks, pipe_rank, replicas, replica


def read_config(path: str | None) -> dict[str, Any]:
    """A DeepSpeed configuration in any form that DeepSpeed takes, looked at before any data are; a peak rate of ``"auto"`` is
    filled in later."""
    if path is None:
        raise ConfigError("--deepspeed_config", path, "a DeepSpeed JSON file is needed", "See ds_configs/")
    try:
        config = read_json(path)
    except ConfigError as error:
        _, value, allowed, hint = error.fields
        raise ConfigError("--deepspeed_config", value, allowed, f"{hint} See ds_configs/") from error
    block = parse_block(config)
    check_settings(_without_auto(config), decoupled=block is not None and not block.is_plain_backprop)
    return config


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    optimizer = config.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    if not isinstance(optimizer, dict) or not isinstance(params, dict) or params.get("lr") != "auto":
        return config
    return config | {"optimizer": optimizer | {"params": {k: v for k, v in params.items() if k != "lr"}}}


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """At most two optimizer groups: weights, and what should not decay (biases and norms: parameters of one dimension)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_peak_lr(config: dict[str, Any], lr: float | None, rule: float) -> float:
    """Write the peak learning rate into the optimizer's block: ``lr``, else the JSON's own, else ``rule``."""
    params = config.setdefault("optimizer", {"type": "SGD"}).setdefault("params", {})
    if lr is not None:
        params["lr"] = lr
    elif params.get("lr", "auto") == "auto":
        params["lr"] = rule
    return float(params["lr"])


def lr_schedule(
    kind: str, updates: int, warmup: int, steps: Sequence[float] = ()
) -> Callable[[Optimizer], LambdaLR]:
    """A scheduler, counted in updates, for each optimizer that it is given.

    Args:
        kind: ``cosine`` to zero, or ``steps``: times 0.1 at each of ``steps``, shares of all updates.
        updates: how many there will be.
        warmup: over so many the rate grows linearly to its peak.
    """

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        if kind == "cosine":
            done = (update - warmup) / max(1, updates - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return 0.1 ** sum(update >= share * updates for share in steps)

    return lambda optimizer: LambdaLR(optimizer, factor)


def peak_memory_bytes() -> int:
    """The most that this process has held: on the accelerator's device, or without one in main memory."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return int(accelerator.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def engine_numbers(engine: Any, pipe_ranks: int, config: dict[str, Any]) -> dict[str, Any]:
    """Method, stages, delays and traffic; a collective call. DeepSpeed's own engine counts no bytes: null."""
    if hasattr(engine, "decoupled_summary"):
        return dict(engine.decoupled_summary())
    return {
        "method": config.get("decoupled", {}).get("method", "deepspeed"),
        "stages": pipe_ranks,
        "delays": [0] * pipe_ranks,
        "bytes_sent": 0 if pipe_ranks == 1 else None,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """``content`` with null for what is not a number."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(clean(content), indent=2, allow_nan=False) + "\n")


Curves = dict[str, list[tuple[float, float]]]
"""Points ``(x, y)`` by the curve's name; those without a value are left out."""


def plot_curves(path: Path, title: str, x_name: str, axes: dict[str, Curves],
                by_stage: dict[str, Curves] | None = None) -> None:
    """One picture.

    Args:
        axes: the left axis's name and its curves; if there is a second one, the right axis's.
        by_stage: panels below, with one curve a stage; those without curves are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    below = {name: curves for name, curves in (by_stage or {}).items() if curves}
    figure, grid = plt.subplots(1 + len(below), figsize=(7, 4 + 3 * len(below)), layout="constrained", sharex=True,
                                squeeze=False)
    first, *panels = grid[:, 0]

    def draw(axis: Any, name: str, points: list[tuple[float, float]], colour: Any) -> None:
        known = [(x, y) for x, y in points if math.isfinite(y)]
        axis.plot([x for x, _ in known], [y for _, y in known], marker=".", color=colour, label=name)

    colours = iter(f"C{i}" for i in range(10))
    for number, (axis_name, curves) in enumerate(axes.items()):
        axis = first if number == 0 else first.twinx()
        for name, points in curves.items():
            colour = next(colours)
            draw(axis, name, points, colour)
        axis.set_ylabel(axis_name, color=colour if len(curves) == 1 else "black")
        if len(curves) > 1:
            axis.legend()
    for panel, (axis_name, curves) in zip(panels, below.items()):
        for place, (name, points) in enumerate(curves.items()):
            draw(panel, name, points, plt.get_cmap("viridis")(place / max(1, len(curves) - 1)))
        panel.set_ylabel(axis_name)
        panel.legend(fontsize="small", ncols=2)
    (panels or [first])[-1].set_xlabel(x_name)
    first.xaxis.set_major_locator(MaxNLocator(integer=True))
    first.set_title(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
