"""One run of the delay study: a reversible GPT trained by the engine on one rank, in a process of its own."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import Any

import common
import deepspeed
import language_model
import torch
import torch.distributed as dist
from text_data import Bytes, Corpus, RandomWindows, read_text
from torch import Tensor

import ds_decoupled
from ds_decoupled.config import PRESETS
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import GPTConfig, build_gpt, next_token_loss
from ds_decoupled.nn import ReversibleCoupling

#: What the study's optimizers are in the JSON; ``lr`` is set by the run. Others go by their import path.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"type": "AdamW", "params": {"torch_adam": True, "weight_decay": 0.01}},
    "muon": {"type": "Muon", "params": {"torch_adam": True, "momentum": 0.95, "weight_decay": 0.01}},
    "nadam": {"type": "torch.optim.NAdam", "params": {"betas": [0.99, 0.999], "weight_decay": 0.01,
                                                      "decoupled_weight_decay": True}},
    "soap": {"type": "pytorch_optimizer.SOAP", "params": {"weight_decay": 0.01}},
}

#: DeepSpeed's Muon steps by sqrt(max(1, rows / columns)) in spectral norm; its rate over the AdamW half's, so that an update
#: of a matrix is about as large as AdamW's (0.2 sqrt(larger side), arXiv 2502.16982, for matrices of width 128).
MUON_OVER_ADAM = 2.3


@dataclass(frozen=True)
class Study:
    """What all runs of a study share.

    Attributes:
        data: as ``text_data.read_text`` takes it; every byte is a token, the last tenth is for validation.
        micro_batches: to train on.
        warmup: share of the updates over which the rate rises; then it falls by a cosine to 0.
        eval_micro_batches: to validate on.
        probe_every: micro-batches from one whose reconstruction is looked at to the next.
    """

    data: str
    micro_batches: int = 1500
    blocks: int = 4
    width: int = 128
    heads: int = 4
    sequence: int = 64
    micro_batch: int = 16
    warmup: float = 0.05
    eval_micro_batches: int = 50
    probe_every: int = 25

    def stage_bounds(self, stages: int) -> list[int]:
        """Layers at which J stages begin: the embedding joined to the first one's half-blocks, the head to the last one's.

        Two more stages than half-blocks: embedding and head are stages of their own.

        >>> Study("topics").stage_bounds(4), Study("topics").stage_bounds(10)
        ([0, 3, 5, 7, 10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
        """
        halves = 2 * self.blocks
        if stages == halves + 2:
            return list(range(stages + 1))
        if not 1 <= stages <= halves:
            raise ConfigError("--stages", stages, f"{self.blocks} blocks make 1 to {halves} stages, or {halves + 2} with "
                              "embedding and head as stages of their own")
        return [0, *(1 + round(halves * s / stages) for s in range(1, stages)), halves + 2]


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        method: a preset's name; ``backprop`` knows no stages, hops or ``lr_by_delay``.
        stages: J.
        hops: ticks from stage to stage, forward and backward.
        k: micro-batches an update.
        optimizer: a name of ``OPTIMIZERS`` or an import path.
        lr: peak; of Muon's AdamW half, the matrices' being ``MUON_OVER_ADAM`` times as large.
        embedding_std: scale of the streams at the start.
        lr_by_delay: as in the ``decoupled`` block.
        params: further parameters of the optimizer, as JSON text.
        block: further settings of the ``decoupled`` block, as JSON text.
        seed: of weights and data.
    """

    method: str
    stages: int
    hops: tuple[int, int]
    k: int
    optimizer: str
    lr: float
    embedding_std: float = 0.3
    lr_by_delay: int = 0
    params: str = "{}"
    seed: int = 0
    block: str = "{}"

    @property
    def delay(self) -> float:
        """Of the first stage, in updates."""
        window = json.loads(self.block).get("window", PRESETS[self.method].window)
        above = min(window or self.stages, self.stages) - 1  # stages whose losses it waits for
        return 0.0 if self.flushes else sum(self.hops) * above / self.k

    @property
    def flushes(self) -> bool:
        return self.method in ("backprop", "reversible")

    @property
    def label(self) -> str:
        """For messages."""
        where = "" if self.method == "backprop" else f" J={self.stages} hops={self.hops[0]},{self.hops[1]}"
        more = f" lr_by_delay={self.lr_by_delay}" if self.lr_by_delay else ""
        more += "".join(f" {text}" for text in (self.params, self.block) if text != "{}")
        return (f"{self.method}{where} k={self.k} {self.optimizer} lr={self.lr:g} std={self.embedding_std:g}{more} "
                f"seed={self.seed}")

    def simplified(self) -> Setting:
        """Without what the method does not know, and with JSON spelt in one way, so that equal runs are equal."""
        params, block = (json.dumps(json.loads(text), separators=(",", ":"), sort_keys=True)
                         for text in (self.params, self.block))
        if not self.flushes:
            return replace(self, params=params, block=block)
        stages = 1 if self.method == "backprop" else self.stages
        return replace(self, params=params, block="{}", stages=stages, hops=(0, 1), lr_by_delay=0)

    def config(self, study: Study) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        optimizer = copy.deepcopy(OPTIMIZERS.get(self.optimizer, {"type": self.optimizer, "params": {}}))
        optimizer["params"]["lr"] = self.lr
        if self.optimizer == "muon":
            optimizer["params"]["muon_lr"] = MUON_OVER_ADAM * self.lr
        optimizer["params"].update(json.loads(self.params))
        block: dict[str, Any] = {"method": self.method}
        if self.method != "backprop":
            block["stages"] = study.stage_bounds(self.stages)
        if not self.flushes:
            block |= {"hops": list(self.hops), "lr_by_delay": self.lr_by_delay, **json.loads(self.block)}
        return {"train_micro_batch_size_per_gpu": study.micro_batch, "gradient_accumulation_steps": self.k,
                "gradient_clipping": 0.0, "steps_per_print": 10**9, "optimizer": optimizer, "decoupled": block}


@dataclass
class ReconstructionProbe:
    """How far the lowest coupling's rebuilt input is from the one it was given; the engine knows nothing of it.

    A coupling sees micro-batches in order in both directions, so a queue of remembered inputs is enough.

    Attributes:
        every: micro-batches from one that is looked at to the next.
        errors: ``|rebuilt - true| / |true|`` over both streams, of those looked at.
    """

    every: int
    errors: list[float] = field(default_factory=list)

    def watch(self, coupling: Any) -> None:
        """Look on at ``coupling``'s own ``forward`` and ``reverse``."""
        forward, reverse = coupling.forward, coupling.reverse
        remembered: deque[tuple[Tensor, ...]] = deque()
        seen, rebuilt = 0, 0

        def forward_seen(streams: tuple[Tensor, ...]) -> Any:
            nonlocal seen
            if coupling.training:
                if seen % self.every == 0:
                    remembered.append(tuple(x.detach() for x in streams[:2]))
                seen += 1
            return forward(streams)

        def reverse_seen(outputs: Any, grads: Any) -> Any:
            nonlocal rebuilt
            inputs, input_grads = reverse(outputs, grads)
            if rebuilt % self.every == 0:
                true, found = (torch.stack(pair) for pair in (remembered.popleft(), inputs[:2]))
                self.errors.append(((found - true).norm() / true.norm()).item())
            rebuilt += 1
            return inputs, input_grads

        coupling.forward, coupling.reverse = forward_seen, reverse_seen


def train(setting: Setting, study: Study, progress: Callable[[int], None]) -> dict[str, Any]:
    """Train, drain, validate; joins a world of its own that has one rank.

    Args:
        progress: is told how many micro-batches are through.
    """
    config = setting.config(study)
    corpus = Corpus.of(read_text(study.data), Bytes(), study.sequence)
    batches = RandomWindows(corpus.train, study.micro_batch, study.sequence, seed=setting.seed)
    updates = study.micro_batches // setting.k
    gpt = GPTConfig(study.blocks, study.width, study.heads, embedding_std=setting.embedding_std)
    model = ds_decoupled.DecoupledPipelineModule(build_gpt(gpt), config=copy.deepcopy(config), num_stages=1,
                                                 loss_fn=next_token_loss, base_seed=setting.seed,
                                                 sample_input=torch.zeros(study.micro_batch, study.sequence, dtype=torch.long))
    engine, *_ = ds_decoupled.initialize(
        model=model, config=copy.deepcopy(config), model_parameters=common.parameter_groups(model),
        lr_scheduler=common.lr_schedule("cosine", updates, round(study.warmup * updates)))
    probe = ReconstructionProbe(study.probe_every)
    if hasattr(engine, "stages") and engine.axes.recover == "reconstruct" and len(engine.stages) > 1:
        probe.watch(next(layer for layer in model.forward_funcs if isinstance(layer, ReversibleCoupling)))
    losses: list[float] = []
    start = time.perf_counter()
    for update in range(updates):
        losses.append(engine.train_batch(data_iter=batches).item())
        progress((update + 1) * setting.k)
    if hasattr(engine, "drain"):
        engine.drain()
    seconds = time.perf_counter() - start
    validation = language_model.validate(engine, corpus, study.micro_batch, study.sequence, study.eval_micro_batches)
    late = [loss for loss in losses[-max(1, updates // 20):] if math.isfinite(loss)]
    return {"validation_loss": validation, "train_loss": fmean(late) if late else math.nan,
            "reconstruction_error": fmean(probe.errors) if probe.errors else None,
            "largest_reconstruction_error": max(probe.errors, default=None), "seconds": seconds,
            "curves": {"train_loss": losses[::max(1, updates // 100)], "reconstruction_error": probe.errors}}


@contextlib.contextmanager
def lone_world() -> Iterator[None]:
    """A world of torch.distributed with one rank, which needs no port."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend="gloo")
    yield
    dist.destroy_process_group()


def child(pipe: Connection, setting: Setting, study: Study, threads: int, log: Path) -> None:
    """A process's whole life: sends ``("progress", micro-batches)``, then ``("done", results)`` or ``("error", text)``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(threads)
    try:
        # Compiling Muon takes 32 s of every process, and DeepSpeed's own engine would do it.
        with lone_world(), torch.compiler.set_stance("force_eager"):
            results = train(setting, study, lambda done: pipe.send(("progress", done)))
        pipe.send(("done", results))
    except BaseException as error:  # whatever it is, the parent goes on with the other runs
        traceback.print_exc()
        with contextlib.suppress(OSError):
            pipe.send(("error", f"{type(error).__name__}: {error}"))
    os._exit(0)  # no destructor waits for anything
