"""One run of the delay study: a reversible GPT trained by the engine on one rank."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any

import deepspeed
import torch

import ds_decoupled
from data.text import read_text
from data.tokens import Bytes
from data.windows import Corpus, RandomWindows
from ds_decoupled.models import GPTConfig, build_gpt, next_token_loss
from lm.validation import validate
from run.rates import lr_schedule, parameter_groups
from run.worlds import Parent
from studies.probe import ReconstructionProbe
from studies.settings import Setting, Study


def train(setting: Setting, study: Study, progress: Callable[[int], None]) -> dict[str, Any]:
    """Train, drain, validate; in a world of one rank.

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
        model=model, config=copy.deepcopy(config), model_parameters=parameter_groups(model),
        lr_scheduler=lr_schedule("cosine", updates, round(study.warmup * updates)))
    probe = ReconstructionProbe(study.probe_every)
    if setting.method != "backprop" and len(engine.stages) > 1:
        probe.watch(engine.stages[0])
    losses: list[float] = []
    start = time.perf_counter()
    for update in range(updates):
        losses.append(engine.train_batch(data_iter=batches).item())
        progress((update + 1) * setting.k)
    engine.drain()
    seconds = time.perf_counter() - start
    validation = validate(engine, corpus, study.micro_batch, study.sequence, study.eval_micro_batches)
    staleness = [row["mean"] for row in engine.decoupled_summary().get("staleness", [])]
    late = [loss for loss in losses[-max(1, updates // 20):] if math.isfinite(loss)]
    return {"validation_loss": validation, "train_loss": fmean(late) if late else math.nan,
            "reconstruction_error": fmean(probe.errors) if probe.errors else None,
            "largest_reconstruction_error": max(probe.errors, default=None), "seconds": seconds,
            "staleness": staleness,
            "curves": {"train_loss": losses[::max(1, updates // 100)], "reconstruction_error": probe.errors}}


def train_alone(parent: Parent, setting: Setting, study: Study) -> dict[str, Any]:
    """A process's task: tells how many micro-batches are through, and then what :func:`train` gives."""
    deepspeed.init_distributed(dist_backend="gloo")
    # Compiling Muon takes 32 s of every process, and DeepSpeed's own engine would do it.
    with torch.compiler.set_stance("force_eager"):
        return train(setting, study, parent.tell)
