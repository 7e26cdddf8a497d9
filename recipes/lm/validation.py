"""What a language model makes of text that it was not trained on: its loss, and text that goes on from a prompt."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.examples import NOT_ASKED, Instructions
from data.stream import Stream
from data.windows import Batch, Corpus
from ds_decoupled.collectives import from_rank
from ds_decoupled.flushed import FlushedPipelineEngine
from run.evaluation import evaluate


def validate(engine: Any, corpus: Corpus | Instructions | Stream | None, micro_batch: int, sequence: int, limit: int) -> float:
    """Mean loss per token over the validation text, in nats, on every rank and to DeepSpeed's monitor; a collective call."""
    batches = None if corpus is None else corpus.tests(micro_batch, sequence, limit)
    if batches and isinstance(engine, FlushedPipelineEngine):  # DeepSpeed's own engine cannot take a smaller last one
        batches = [_filled(batch, micro_batch) for batch in batches]
    count = from_rank(0, 0 if batches is None else len(batches))
    losses = evaluate(engine, None if batches is None else iter(batches), count)
    value = math.nan
    if losses is not None and batches is not None:
        sizes = torch.tensor([float((targets != NOT_ASKED).sum()) for _, targets in batches])
        value = ((torch.stack([loss.float().cpu().reshape(()) for loss in losses]) * sizes).sum() / sizes.sum()).item()
    value = from_rank(dist.get_world_size() - 1, value)
    if dist.get_rank() == 0 and engine.monitor.enabled:
        engine.monitor.write_events([("Train/Samples/eval_loss", value, engine.global_samples)])
    return value


def _filled(batch: Batch, micro_batch: int) -> Batch:
    """``batch`` with as many rows as ``micro_batch``, those behind it asked for nothing."""
    inputs, targets = batch
    more = micro_batch - len(inputs)
    return (torch.cat([inputs, inputs.new_zeros(more, inputs.shape[1])]),
            torch.cat([targets, targets.new_full((more, targets.shape[1]), NOT_ASKED)]))


def generate(engine: Any, prompt: list[int], length: int, *, window: int, vocab_size: int, temperature: float,
             seed: int) -> list[int]:
    """``length`` tokens drawn one after the other, behind ``prompt``; a collective call, whatever the number of ranks."""
    ids, generator = list(prompt), torch.Generator().manual_seed(seed)
    for _ in tqdm(range(length), unit="token", leave=False, disable=dist.get_rank() != 0):
        seen = torch.tensor([ids[-window:]])
        logits = evaluate(engine, iter([(seen, seen)]), 1, compute_loss=False)
        token = 0
        if logits is not None:
            chances = (logits[0][0, -1, :vocab_size].float().cpu() / max(temperature, 1e-3)).softmax(-1)
            token = int(torch.multinomial(chances, 1, generator=generator))
        ids.append(from_rank(dist.get_world_size() - 1, token))
    return ids[len(prompt):]


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that is too large a number."""
    return math.exp(loss) if not loss > 700 else math.inf
