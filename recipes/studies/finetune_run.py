"""One run of the fine-tuning study: a pretrained model trained on by the engine, on one rank, and validated as it goes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import deepspeed
import torch

import ds_decoupled
from data.text import read_text
from data.tokens import tokenizer_of
from data.windows import Corpus, RandomWindows
from ds_decoupled.models import from_hugging_face, next_token_loss
from lm.validation import validate
from run.rates import parameter_groups
from run.results import peak_memory_bytes
from run.worlds import Parent
from studies.finetune_bare import train_bare
from studies.finetune_settings import BARE, FinetuneSetting, FinetuneStudy


def train(setting: FinetuneSetting, study: FinetuneStudy, progress: Callable[[int], None]) -> dict[str, Any]:
    """Train, in a world of one rank.

    Args:
        progress: is told how many updates are made.

    Returns:
        Curves by update: the validation loss, and the seconds of training until there.
    """
    tokenizer = tokenizer_of(None, study.model)
    corpus = Corpus.of(read_text(study.data), tokenizer, study.sequence)
    batches = RandomWindows(corpus.train, study.micro_batch, study.sequence, seed=setting.seed)
    layers = from_hugging_face(study.model, untie_embeddings=True)
    config = setting.config(study)
    model = ds_decoupled.DecoupledPipelineModule(
        layers, config=copy.deepcopy(config), num_stages=1, loss_fn=next_token_loss, base_seed=setting.seed,
        sample_input=torch.zeros(study.micro_batch, study.sequence, dtype=torch.long))
    engine, *_ = ds_decoupled.initialize(model=model, config=copy.deepcopy(config), model_parameters=parameter_groups(model))

    def test() -> float:
        return validate(engine, corpus, study.micro_batch, study.sequence, study.eval_micro_batches)

    curves: dict[str, list[float]] = {"updates": [0], "validation_loss": [test()], "seconds": [0.0]}
    seconds = 0.0
    for update in range(1, study.updates + 1):
        start = time.perf_counter()
        engine.train_batch(data_iter=batches)
        if update == study.updates:
            engine.drain()
        seconds += time.perf_counter() - start
        if update in study.ends:
            for name, value in (("updates", update), ("validation_loss", test()), ("seconds", seconds)):
                curves[name].append(value)
        progress(update)
    return {"validation_loss": curves["validation_loss"][-1], "peak_memory_bytes": peak_memory_bytes(),
            "parameters": _parameters(engine), "curves": curves}


def _parameters(engine: Any) -> dict[str, int]:
    """How many there are: of the model, of heads that learn, and of read-only layers that heads end in, each once."""
    heads = [head for stage in getattr(engine, "stages", {}).values() if (head := getattr(stage, "head", None)) is not None]
    own = {id(p): p for head in heads for p in head.parameters()}
    return {"model": sum(p.numel() for p in engine.module.parameters()),
            "heads": sum(p.numel() for p in own.values() if p.requires_grad),
            "read_only": sum(p.numel() for p in own.values() if not p.requires_grad)}


def train_alone(parent: Parent, setting: FinetuneSetting, study: FinetuneStudy) -> dict[str, Any]:
    """A process's task: tells how many updates are made, and then what :func:`train` gives."""
    if setting.method == BARE:
        return train_bare(setting, study, parent.tell)
    deepspeed.init_distributed(dist_backend="gloo")
    return train(setting, study, parent.tell)
