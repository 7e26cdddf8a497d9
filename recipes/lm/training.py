"""The run that the recipes for language models make: text in, layers trained on it, validation, a sample."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.distributed as dist

from data.examples import Instructions
from data.stream import BUFFER, Stream
from data.token_weights import TokenWeights
from data.tokens import Tokenizer
from data.windows import Corpus
from ds_decoupled.collectives import from_rank, gather, together
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import next_token_loss
from lm.corpora import read_corpus
from lm.validation import generate, perplexity, validate
from run.arguments import add_run_arguments
from run.best import Best
from run.options import number, refuse_unused, whole, yes_or_no
from run.rates import lr_schedule, set_peak_lr
from run.results import report, summarize
from run.setup import Setup
from run.speed import Speed
from run.training import Progress, train

EVALUATIONS, WARMUP, TEMPERATURE = 8, 0.05, 0.8
PROMPT = 16
"""Tokens of the validation text that a sample goes on from."""


def add_arguments(parser: argparse.ArgumentParser, *, data: str | None, sequence_length: int, micro_batches: int, lr: float,
                  summary: str) -> None:
    """Options of text and training; those given here are the defaults, and without ``data`` it must be given."""
    kinds = ("a file of text, JSONL or parquet (also .gz), a folder of them, a name of `datasets`, or topics: Python's own "
             "documentation; rows have `text`, `prompt` and `completion`, or `messages`")
    parser.add_argument("--data", default=data, required=data is None, help=kinds + (f" (default: {data})" if data else ""))
    parser.add_argument("--tokenizer", help="bytes, a folder or a hub name (default: the model's own, if it has one, or bytes)")
    parser.add_argument("--validation", metavar="DATA",
                        help="to validate on (default: the last tenth of --data, in whole documents)")
    parser.add_argument("--streaming", action="store_true",
                        help="read rows as they are trained on: for data that memory does not hold")
    parser.add_argument("--buffer_size", type=whole(1), metavar="ROWS",
                        help=f"of a stream, from which the next row is drawn (default: {BUFFER})")
    parser.add_argument("--packing", action="store_true", help="rows one behind another, not each filled up")
    parser.add_argument("--completion_only_loss", type=yes_or_no, nargs="?", const=True, metavar="true|false",
                        help="learn completions and what the assistant says alone (default: true)")
    parser.add_argument("--sequence_length", "--max_length", type=whole(1), default=sequence_length,
                        help="tokens (default: %(default)s)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--micro_batches", type=whole(1), default=micro_batches,
                        help="to train on, per replica (default: %(default)s)")
    length.add_argument("--epochs", "--num_train_epochs", type=number(0, above=True), help="over the data, in whole updates")
    parser.add_argument("--lr", type=number(0), help=f"peak (default: the JSON's, else {lr:g})")
    parser.add_argument("--warmup", type=number(0, 1), help=f"share of all updates (default: {WARMUP})")
    parser.add_argument("--evaluations", type=whole(1, 1_000_000),
                        help=f"over the run (default: {EVALUATIONS}, at most one an update)")
    parser.add_argument("--eval_steps", type=whole(1), metavar="UPDATES", help="from validation to validation, instead of "
                        "--evaluations")
    parser.add_argument("--eval_micro_batches", type=whole(1), default=50,
                        help="to validate on, if the text has as many (default: %(default)s)")
    parser.add_argument("--sample", type=whole(0, 1_000_000), default=300,
                        help="tokens of generated text at the end (default: %(default)s)")
    parser.add_argument("--temperature", type=number(0), help=f"of the sample (default: {TEMPERATURE})")
    parser.add_argument("--peak_tflops", type=number(0, above=True), metavar="N",
                        help="of one device in the type that it trains in (an H100 in bf16: 989), to tell the share used, MFU")
    add_run_arguments(parser, stretch="evaluations", summary=summary)


def loader_of(args: argparse.Namespace, setup: Setup, corpus: Corpus | Instructions | Stream) -> Any:
    """This replica's micro-batches; where the targets of an update may be unevenly spread over them, with their weights."""
    uneven = isinstance(corpus.held if isinstance(corpus, Stream) else corpus, Instructions)
    if not uneven or setup.k * setup.replicas == 1:
        return corpus.loader(setup.micro_batch, args.sequence_length, seed=args.seed, replica=setup.replica,
                             replicas=setup.replicas)
    whole = corpus.loader(setup.micro_batch * setup.replicas, args.sequence_length, seed=args.seed, replica=0, replicas=1)
    return TokenWeights(whole, setup.k, setup.replica, setup.replicas)


def ends_of(updates: int, evaluations: int | None, eval_steps: int | None) -> list[int]:
    """The updates after which it is validated: the last one among them.

    >>> ends_of(10, 2, None), ends_of(10, None, 4)
    ([5, 10], [4, 8, 10])
    """
    if eval_steps is not None:
        return [*range(eval_steps, updates, eval_steps), updates]
    stretches = evaluations or min(EVALUATIONS, updates)
    return [updates * (i + 1) // stretches for i in range(stretches)]


def updates_of(args: argparse.Namespace, setup: Setup, windows: float = math.nan) -> int:
    """How many updates the run makes.

    Args:
        windows: of an epoch; nan where nobody knows.

    Raises:
        ConfigError: if there are none, or fewer than other settings need.
    """
    if args.epochs is not None:
        if math.isnan(windows):
            raise ConfigError("--epochs", args.epochs, "with --streaming nobody knows how many rows there are",
                              "Give --micro_batches")
        updates = max(1, round(args.epochs * windows / setup.update_samples))
    else:
        updates = args.micro_batches // setup.k
        if updates < 1:
            raise ConfigError("--micro_batches", args.micro_batches, f"an update takes k = {setup.k}", "Give more")
    if args.evaluations is not None and args.evaluations > updates:
        raise ConfigError("--evaluations", args.evaluations, f"the run makes {updates} updates", "Take fewer")
    setup.check_taught(updates)
    return updates


def run(args: argparse.Namespace, setup: Setup, layers: list[Any], tokenizer: Tokenizer, *, lr: float, name: str,
        title: str, test_first: bool = False, **facts: Any) -> Any:
    """Train ``layers`` on the text that ``args`` names, report, and return the engine; a collective call.

    Args:
        lr: the peak learning rate where neither ``args`` nor the JSON has one.
        name: of the summary's file, before the method's.
        title: what is trained, in words.
        test_first: whether to validate before all training.
        facts: more fields of the summary.
    """
    if args.sample == 0:
        refuse_unused(args, ["temperature"], "with --sample 0 no text is drawn")
    micro_batch, sequence = setup.micro_batch, args.sequence_length
    if args.eval_steps is not None:
        refuse_unused(args, ["evaluations"], "--eval_steps says when to validate", "Leave one of them out")
    if args.epochs is None:  # what is wrong is said before all is read
        updates = updates_of(args, setup)
    corpus = together((lambda: read_corpus(args, tokenizer)) if setup.holds_data else None)
    tokens_of_epoch = from_rank(0, 0 if corpus is None else corpus.tokens)
    if args.epochs is not None:
        updates = updates_of(args, setup, tokens_of_epoch / sequence)
        args.micro_batches = updates * setup.k  # as the summary has it
    loader = None if corpus is None else loader_of(args, setup, corpus)
    set_peak_lr(setup.config, args.lr, rule=lr)
    warmup = WARMUP if args.warmup is None else args.warmup
    engine = setup.engine(layers, loss_fn=next_token_loss, seed=args.seed,
                          schedule=lr_schedule("cosine", updates, round(warmup * updates)),
                          sample_input=torch.zeros(micro_batch, sequence, dtype=torch.long))

    def test() -> float:
        return validate(engine, corpus, micro_batch, sequence, args.eval_micro_batches)

    def show(progress: Progress) -> str:
        return f"loss {progress.train_loss[-1]:.3f}, validation {progress.last_score:.3f}"

    # Forward, back to the stream, and back to what learns: 2 for each weight that takes part (arXiv 2001.08361, 2.1).
    flops = sum(gather(sum(2.0 * parameter.numel() * (2 + parameter.requires_grad) for parameter in engine.module.parameters())
                       * (setup.replica == 0)))
    peak = None if args.peak_tflops is None else 1e12 * args.peak_tflops * dist.get_world_size()
    trained = train(args, setup, engine, loader, test=test, show=show, test_first=test_first,
                    ends=ends_of(updates, args.evaluations, args.eval_steps),
                    best=Best.of(args, lower=True),
                    speed=Speed(setup.update_samples, "tokens", sequence, flops, peak))
    text = ""
    if args.sample:
        temperature = TEMPERATURE if args.temperature is None else args.temperature
        prompt = from_rank(0, [] if corpus is None else corpus.prompt(PROMPT))
        text = tokenizer.decode(prompt + generate(engine, prompt, args.sample, window=sequence, seed=args.seed,
                                                  vocab_size=tokenizer.vocab_size, temperature=temperature))
    losses, validation = trained.progress.train_loss, trained.progress.score
    tokens = [n * setup.update_samples * sequence for n in trained.progress.updates]
    before = {"validation_loss_before": validation[0], "perplexity_before": perplexity(validation[0])} if test_first else {}
    summary = summarize(
        args, setup, engine, trained,
        **facts,
        data=args.data,
        epochs=tokens[-1] / tokens_of_epoch,
        **before,
        validation_loss=trained.score,
        perplexity=perplexity(trained.score),
        best_update=trained.best,
        curves={"tokens": tokens, "train_loss": losses, "validation_loss": validation, "seconds": trained.progress.seconds},
        stage_curves={name: trained.progress.stage_curves(name) for name in ("loss", "accuracy")},
        sample=text,
    )
    summary["tokens_per_second"] = summary["samples_per_second"] * sequence
    if text and dist.get_rank() == 0:
        print(f"--- a sample ---\n{text}\n----------------")
    was = f" ({validation[0]:.3f} before)" if test_first else ""
    report(
        args, summary, f"{name}_{summary['method']}", f"{summary['method']}: {title}, {summary['stages']} stages",
        ("thousands of tokens", [n / 1000 for n in tokens]),
        {"nats per token": {"training loss": losses, "validation loss": validation}},
        f"validation loss {trained.score:.3f} nats{was}, perplexity {summary['perplexity']:.2f}, "
        f"{summary['tokens_per_second']:.0f} tokens/s",
        by_stage={"the stage's own loss, nats per token": trained.progress.stage_curves("loss")},
    )
    return engine
