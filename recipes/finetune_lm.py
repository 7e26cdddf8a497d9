"""Fine-tune a causal language model of transformers, with the method that the DeepSpeed JSON names.

    deepspeed recipes/finetune_lm.py --deepspeed_config ds_configs/delayed_lm.json --model FOLDER --data TEXT --output tuned
    deepspeed --num_gpus 4 recipes/finetune_lm.py --deepspeed_config ds_configs/dsp_lm.json --model gpt2 --untie_embeddings \\
        --data shakespeare.txt --lora_rank 8 --output adapters --adapters_only

Any layer of such a model adds to its input, x + f(x), and cannot be undone: methods that rebuild inputs (petra, reversible)
are refused.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch loads OpenMP
    from ds_decoupled.threads import share_cores

    share_cores()

import argparse
from typing import Any

import lm.training
from ds_decoupled.errors import ConfigError
from lm import hugging_face
from run.options import number, refuse_unused, whole
from run.processes import distributed
from run.setup import Setup

LR = 2e-4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that save_pretrained wrote, or a hub name")
    hugging_face.add_arguments(parser)
    parser.add_argument("--lora_rank", type=whole(0, 10_000), default=0,
                        help="of adapters, which then are all that is trained (default: 0, none)")
    parser.add_argument("--lora_alpha", type=number(0, above=True), help="scale of the adapters (default: twice the rank)")
    parser.add_argument("--lora_targets", nargs="+", metavar="NAME",
                        help="layers that get adapters, or all-linear (default: peft's for this architecture)")
    parser.add_argument("--adapters_only", action="store_true", help="--output gets the adapters, not the whole model")
    lm.training.add_arguments(parser, data=None, sequence_length=128, micro_batches=1000, lr=LR,
                              summary="runs/finetune_METHOD.json")
    return parser.parse_args()


def lora(args: argparse.Namespace) -> Any:
    """The adapters that ``args`` asks for; None for none."""
    if args.lora_rank == 0:
        for value, option in ((args.adapters_only, "--adapters_only"), (args.lora_targets, "--lora_targets"),
                              (args.lora_alpha, "--lora_alpha")):
            if value:
                raise ConfigError(option, value, "without --lora_rank there are no adapters", "Give --lora_rank, for example 8")
        return None
    from peft import LoraConfig

    if args.output is None:
        refuse_unused(args, {"adapters_only": False}, "without --output nothing is written", "Give --output")
    targets = args.lora_targets
    return LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha or 2 * args.lora_rank, task_type="CAUSAL_LM",
                      target_modules=targets[0] if targets == ["all-linear"] else targets,
                      base_model_name_or_path=args.model)


def train(args: argparse.Namespace) -> None:
    setup = Setup.of(args)
    layers, tokenizer = hugging_face.model_of(args, setup, peft_config=lora(args))
    engine = lm.training.run(args, setup, layers, tokenizer, lr=LR, name="finetune", title=f"{args.model} on {args.data}",
                             test_first=True, model=args.model, lora_rank=args.lora_rank)
    hugging_face.save(args, engine, tokenizer, merge_adapters=not args.adapters_only)


def main() -> None:
    args = parse_arguments()
    with distributed(args.backend):
        train(args)


if __name__ == "__main__":
    main()
