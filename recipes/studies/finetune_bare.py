"""What backpropagation comes to without an engine: transformers and torch alone, on the same tokens in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from data.text import read_text
from data.tokens import tokenizer_of
from data.windows import Corpus, RandomWindows
from run.rates import parameter_groups
from run.results import peak_memory_bytes
from studies.finetune_settings import WEIGHT_DECAY, FinetuneSetting, FinetuneStudy


def train_bare(setting: FinetuneSetting, study: FinetuneStudy, progress: Callable[[int], None]) -> dict[str, Any]:
    """As :func:`studies.finetune_run.train`."""
    from transformers import AutoModelForCausalLM

    corpus = Corpus.of(read_text(study.data), tokenizer_of(None, study.model), study.sequence)
    batches = RandomWindows(corpus.train, study.micro_batch, study.sequence, seed=setting.seed)
    tests = corpus.tests(study.micro_batch, study.sequence, study.eval_micro_batches)
    model = AutoModelForCausalLM.from_pretrained(study.model, dtype=torch.float32)
    readout = model.get_output_embeddings()  # as untie_embeddings=True: asked of transformers, it would begin at random
    readout.weight = torch.nn.Parameter(readout.weight.detach().clone())
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=study.lr, weight_decay=WEIGHT_DECAY)

    def loss(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), targets.flatten())

    def test() -> float:
        model.eval()
        with torch.no_grad():
            value = sum(loss(ids, targets).item() * len(ids) for ids, targets in tests) / sum(len(ids) for ids, _ in tests)
        model.train()
        return value

    curves: dict[str, list[float]] = {"updates": [0], "validation_loss": [test()], "seconds": [0.0]}
    seconds = 0.0
    for update in range(1, study.updates + 1):
        start = time.perf_counter()
        loss(*next(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        if update in study.ends:
            for name, value in (("updates", update), ("validation_loss", test()), ("seconds", seconds)):
                curves[name].append(value)
        progress(update)
    return {"validation_loss": curves["validation_loss"][-1], "peak_memory_bytes": peak_memory_bytes(), "curves": curves,
            "parameters": {"model": sum(p.numel() for p in model.parameters()), "heads": 0, "read_only": 0}}
