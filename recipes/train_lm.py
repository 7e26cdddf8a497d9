"""Train a language model from scratch, with the method that the DeepSpeed JSON names.

    deepspeed recipes/train_lm.py --deepspeed_config ds_configs/petra_lm.json
    deepspeed --num_gpus 4 recipes/train_lm.py --deepspeed_config ds_configs/petra_lm.json --data shakespeare.txt --model small
    deepspeed recipes/train_lm.py --deepspeed_config ds_configs/dsp_lm.json --model recipes/lm/tiny_llama.json --output llama

The first two are reversible GPTs, which PETRA needs; the last one any architecture of transformers, by its config.json.
Byte by byte on the Python documentation's own topics, unless told otherwise: nothing is downloaded.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores()

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm.training
from data.tokens import Tokenizer, tokenizer_of
from ds_decoupled.errors import ConfigError
from ds_decoupled.models import SIZES, build_gpt
from lm import hugging_face
from run.options import number, refuse_unused, whole
from run.processes import distributed
from run.setup import Setup

LR, EMBEDDING_STD = 1e-3, 0.3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny",
                        help=f"a GPT's size ({', '.join(SIZES)}), or a config.json of transformers (default: tiny)")
    parser.add_argument("--plain", action="store_true", help="a residual GPT of the same size, which cannot be inverted")
    parser.add_argument("--blocks", type=whole(1, 10_000), help="of a GPT, instead of the size's own")
    parser.add_argument("--dropout", type=number(0, 1, below=True), help="of a GPT (default: 0)")
    parser.add_argument("--embedding_std", type=number(0, above=True), help="of a GPT: scale of the stream against what blocks "
                        f"add; larger bears delay better (default: {EMBEDDING_STD})")
    hugging_face.add_arguments(parser)
    lm.training.add_arguments(parser, data="topics", sequence_length=64, micro_batches=1000, lr=LR,
                              summary="runs/lm_METHOD.json")
    return parser.parse_args()


def gpt(args: argparse.Namespace) -> tuple[list[Any], Tokenizer]:
    """Layers and tokenizer of a GPT of this project, reversible unless told otherwise."""
    if args.output is not None:
        raise ConfigError("--output", args.output, f"transformers cannot load the GPT {args.model!r}, which is this project's "
                          "own", "Take --save_checkpoint, or a config.json as --model")
    tokenizer, size = tokenizer_of(args.tokenizer), SIZES[args.model]
    size = replace(size, vocab_size=tokenizer.vocab_size, dropout=args.dropout or 0.0,
                   embedding_std=args.embedding_std or EMBEDDING_STD, blocks=args.blocks or size.blocks)
    return build_gpt(size, reversible=not args.plain), tokenizer


def train(args: argparse.Namespace) -> None:
    setup = Setup.of(args)
    own = args.model in SIZES
    if not own and not Path(args.model).exists():
        raise ConfigError("--model", args.model, f"it is neither a size ({', '.join(SIZES)}) nor a config.json of transformers")
    if own:
        refuse_unused(args, {"output_dtype": None, "max_shard_size": None}, "transformers cannot load this project's own GPTs")
        refuse_unused(args, {"untie_embeddings": False}, f"the GPT {args.model} has two tensors, as it is")
    else:
        refuse_unused(args, {"plain": False, "blocks": None, "dropout": None, "embedding_std": None},
                      f"it is for this project's GPTs, and {args.model} says by itself what the model is", "Write it there")
    layers, tokenizer = gpt(args) if own else hugging_face.model_of(args, setup, fresh=True)
    what = f"{'plain' if args.plain else 'reversible'} GPT {args.model}" if own else f"new {args.model}"
    engine = lm.training.run(args, setup, layers, tokenizer, lr=LR, name="lm", title=f"{what} on {args.data}",
                             model=args.model, reversible=own and not args.plain)
    hugging_face.save(args, engine, tokenizer)


def main() -> None:
    args = parse_arguments()
    with distributed(args.backend):
        train(args)


if __name__ == "__main__":
    main()
