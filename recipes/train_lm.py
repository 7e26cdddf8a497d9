"""Train a GPT from scratch, reversible or plain, with the method that the DeepSpeed JSON names.

    deepspeed recipes/train_lm.py --deepspeed_config ds_configs/petra.json
    deepspeed --num_gpus 4 recipes/train_lm.py --deepspeed_config ds_configs/petra.json --data shakespeare.txt --model small

Byte by byte on the Python documentation's own topics, unless told otherwise: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import deepspeed
import torch
import torch.distributed as dist
from text_data import Bytes, Corpus, HuggingFaceTokenizer, RandomWindows, Tokenizer, in_order, read_text
from torch import Tensor
from tqdm import tqdm

import ds_decoupled
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import SIZES, build_gpt, next_token_loss


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=sorted(SIZES), help="size (default: tiny)")
    parser.add_argument("--plain", action="store_true", help="a residual GPT of the same size, which cannot be inverted")
    parser.add_argument("--blocks", type=int, help="instead of the size's own")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--embedding_std", type=float, default=0.3,
                        help="scale of the stream against what blocks add; larger bears delay better (default: 0.3)")
    parser.add_argument("--data", default="topics", help="topics, a text file, a folder of them, or a name of `datasets`")
    parser.add_argument("--tokenizer", help="a folder or hub name (default: bytes)")
    parser.add_argument("--sequence_length", type=int, default=64)
    parser.add_argument("--micro_batches", type=int, default=1000, help="to train on, per replica (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipe_ranks", type=int, help="P, processes a pipeline (default: all)")
    parser.add_argument("--lr", type=float, help="peak (default: the JSON's, else 1e-3)")
    parser.add_argument("--warmup", type=float, default=0.05, help="share of all updates (default: 0.05)")
    parser.add_argument("--evaluations", type=int, default=5, help="over the run (default: 5)")
    parser.add_argument("--eval_micro_batches", type=int, default=50, help="to validate on (default: 50)")
    parser.add_argument("--sample", type=int, default=200, help="tokens of generated text at the end; 0 is none")
    parser.add_argument("--summary", type=Path, help="JSON file of results (default: runs/lm_METHOD.json)")
    parser.add_argument("--plot", type=Path, help="picture of the curves (default: beside the summary)")
    parser.add_argument("--backend", help="of torch.distributed (default: DeepSpeed's choice)")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def validate(engine: Any, corpus: Corpus | None, micro_batch: int, sequence: int, limit: int) -> float:
    """Mean loss per token over the validation text, in nats, on every rank; a collective call."""
    batches = None if corpus is None else in_order(corpus.validation, micro_batch, sequence, limit)
    if batches and not hasattr(engine, "drain"):  # DeepSpeed's own engine cannot take a smaller last one
        batches = [batch for batch in batches if len(batch[0]) == micro_batch] or batches
    count = common.from_rank(0, 0 if batches is None else len(batches))
    engine.total_loss = None  # see train_resnet.evaluate
    losses = engine.eval_batch(None if batches is None else iter(batches), reduce_output=None, bcast_loss=False,
                               num_micro_batches=count)
    value = math.nan
    if losses is not None and batches is not None:
        sizes = torch.tensor([float(x.shape[0]) for x, _ in batches])
        value = ((torch.stack([loss.float().cpu().reshape(()) for loss in losses]) * sizes).sum() / sizes.sum()).item()
    return common.from_rank(dist.get_world_size() - 1, value)


def generate(engine: Any, prompt: list[int], length: int, window: int, seed: int) -> list[int]:
    """``length`` tokens drawn one after the other, behind ``prompt``; a collective call, whatever the number of ranks."""
    ids, generator = list(prompt), torch.Generator().manual_seed(seed)
    for _ in tqdm(range(length), unit="token", leave=False, disable=dist.get_rank() != 0):
        seen = torch.tensor([ids[-window:]])
        engine.total_loss = None
        logits = engine.eval_batch(iter([(seen, seen)]), compute_loss=False, reduce_output=None, bcast_loss=False,
                                   num_micro_batches=1)
        token = 0
        if logits is not None:
            token = int(torch.multinomial(logits[0][0, -1].float().softmax(-1).cpu(), 1, generator=generator))
        ids.append(common.from_rank(dist.get_world_size() - 1, token))
    return ids[len(prompt):]


def train(args: argparse.Namespace) -> None:
    config = common.read_config(args.deepspeed_config)
    pipe_ranks, pipe_rank, replicas, replica = common.pipe_position(args.pipe_ranks)
    micro_batch, k = common.batch_sizes(config, replicas)
    rank, sequence = dist.get_rank(), args.sequence_length
    tokenizer: Tokenizer = HuggingFaceTokenizer(args.tokenizer) if args.tokenizer else Bytes()
    updates = args.micro_batches // k
    if updates < 1:
        raise ConfigError("--micro_batches", args.micro_batches, f"an update takes k = {k}", "Give more.")

    def read() -> Corpus:
        return Corpus.of(read_text(args.data), tokenizer, sequence)

    corpus = common.together(read if pipe_rank in (0, pipe_ranks - 1) else None)
    batches = None if corpus is None else RandomWindows(corpus.train, micro_batch, sequence, seed=args.seed, replica=replica,
                                                        replicas=replicas)
    size = replace(SIZES[args.model], vocab_size=tokenizer.vocab_size, dropout=args.dropout, embedding_std=args.embedding_std,
                   blocks=args.blocks or SIZES[args.model].blocks)
    common.set_peak_lr(config, args.lr, rule=1e-3)
    model = ds_decoupled.DecoupledPipelineModule(
        build_gpt(size, reversible=not args.plain), config=copy.deepcopy(config), num_stages=pipe_ranks,
        loss_fn=next_token_loss, base_seed=args.seed, sample_input=torch.zeros(micro_batch, sequence, dtype=torch.long))
    schedule = common.lr_schedule("cosine", updates, round(args.warmup * updates))
    engine, _, _, _ = ds_decoupled.initialize(
        model=model, config=copy.deepcopy(config), model_parameters=common.parameter_groups(model),
        lr_scheduler=None if "scheduler" in config else schedule)

    train_loss: list[float] = []
    validation_loss: list[float] = []
    seconds = 0.0
    borders = [updates * i // max(1, args.evaluations) for i in range(max(1, args.evaluations) + 1)]
    bar = tqdm(total=updates, unit="update", mininterval=0.5, disable=rank != 0)
    for start, stop in zip(borders, borders[1:]):
        begin = time.perf_counter()
        losses: list[Tensor] = []
        for _ in range(start, stop):
            losses.append(engine.train_batch(data_iter=batches).detach().float().mean())
            bar.update()
        if stop == updates and hasattr(engine, "drain"):
            engine.drain()
        seconds += time.perf_counter() - begin
        train_loss.append(torch.stack(losses).nanmean().item() if losses else math.nan)
        validation_loss.append(validate(engine, corpus, micro_batch, sequence, args.eval_micro_batches))
        bar.set_postfix_str(f"loss {train_loss[-1]:.3f}, validation {validation_loss[-1]:.3f}")
    bar.close()

    text = ""
    if args.sample:
        prompt = common.from_rank(0, [] if corpus is None else corpus.validation[:16].tolist())
        text = tokenizer.decode(prompt + generate(engine, prompt, args.sample, sequence, args.seed))
    numbers = common.engine_numbers(engine, pipe_ranks, config)
    bytes_sent = numbers.pop("bytes_sent", None)
    samples = updates * k * micro_batch * replicas
    corpus_tokens = common.from_rank(0, 0 if corpus is None else len(corpus.train))
    summary = {
        "model": args.model, "reversible": not args.plain, "data": args.data, "pipe_ranks": pipe_ranks, "replicas": replicas,
        "seed": args.seed, "epochs": samples * sequence / max(1, corpus_tokens),
        "train_loss": train_loss[-1], "validation_loss": validation_loss[-1], "perplexity": math.exp(validation_loss[-1]),
        "samples_per_second": samples / seconds, "tokens_per_second": samples * sequence / seconds,
        "peak_memory_bytes": common.largest(common.peak_memory_bytes()),
        "bytes_sent_per_sample": None if bytes_sent is None else bytes_sent / samples,
        "curves": {"train_loss": train_loss, "validation_loss": validation_loss}, "sample": text, "config": config,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
    }
    if rank == 0:
        report(args, numbers | summary)


def report(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Print the result, write the summary and the picture."""
    path = args.summary or Path("runs") / f"lm_{summary['method']}.json"
    plot = args.plot or path.with_suffix(".png")
    title = f"{summary['method']}: {'plain' if args.plain else 'reversible'} GPT {summary['model']} on {summary['data']}"
    curves = summary["curves"]
    common.plot_curves(plot, title, curves["train_loss"], curves["validation_loss"], "validation loss, nats")
    common.write_json(path, summary)
    if summary["sample"]:
        print(f"--- a sample ---\n{summary['sample']}\n----------------")
    print(f"{title}, {summary['stages']} stages on {summary['pipe_ranks']} rank(s): validation loss "
          f"{summary['validation_loss']:.3f} nats, perplexity {summary['perplexity']:.2f}, "
          f"{summary['tokens_per_second']:.0f} tokens/s\nsummary: {path}\ncurves: {plot}")


def main() -> None:
    args = parse_arguments()
    with common.distributed(args.backend):
        train(args)


if __name__ == "__main__":
    main()
