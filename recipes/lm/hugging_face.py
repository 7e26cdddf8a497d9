"""Models of ``transformers`` for the recipes: layers and tokenizer, what to say where they cannot be trained, saving them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import TiedLayerSpec

from data.hub import reached_or_offline
from data.tokens import TOKENIZER_FILES, Bytes, Tokenizer, tokenizer_of
from ds_decoupled.collectives import together
from ds_decoupled.config import DecoupledConfig, parse_block
from ds_decoupled.errors import ConfigError
from run.options import refuse_unused
from run.places import check_folder
from run.setup import Setup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What recipes for models of ``transformers`` take."""
    parser.add_argument("--output", metavar="DIR", help="save for from_pretrained there, model and tokenizer")
    parser.add_argument("--output_dtype", choices=("source", "float32", "bfloat16", "float16"),
                        help="type of the weights in --output (default: source, that of the model which was read)")
    parser.add_argument("--max_shard_size", help='of a file in --output (default: "50GB")')
    parser.add_argument("--untie_embeddings", action="store_true",
                        help="make two tensors of a tied embedding and unembedding; delayed updates need it")


def model_of(args: argparse.Namespace, setup: Setup, *, fresh: bool = False,
             peft_config: Any = None) -> tuple[list[Any], Tokenizer]:
    """Layers and tokenizer of the model that ``args`` names.

    Args:
        fresh: with new weights, by its configuration alone.
        peft_config: adapters to add.

    Raises:
        ConfigError: for a method, a tokenizer, a length of sequences or an output that does not go with the model.
    """
    from ds_decoupled.models import from_hugging_face

    if args.output is None:
        refuse_unused(args, ["output_dtype", "max_shard_size"], "without --output nothing is written", "Give --output")
    check_shard_size(args.max_shard_size)
    together(lambda: check_folder("--output", args.output) if args.output is not None and dist.get_rank() == 0 else None)
    block = parse_block(setup.config)
    _check_method(block)
    with reached_or_offline(args.model):
        source = _configuration(args.model) if fresh else args.model
        layers = from_hugging_face(source, untie_embeddings=args.untie_embeddings, peft_config=peft_config)
        configuration = source if fresh else _configuration(args.model)
    if args.untie_embeddings and not any(getattr(c, "tie_word_embeddings", True)
                                         for c in (configuration, configuration.get_text_config())):
        raise ConfigError("--untie_embeddings", True, f"it would change nothing: {args.model} has two tensors, as it is",
                          "Leave it out")
    if any(isinstance(layer, TiedLayerSpec) for layer in layers):
        _check_tied(block)
    if peft_config is not None:
        _check_adapters(layers, peft_config)
    tokenizer = tokenizer_of(args.tokenizer, args.model)
    _check_left_over(args, tokenizer)
    _check_sizes(args, configuration.get_text_config(), tokenizer)
    return layers, tokenizer


def save(args: argparse.Namespace, engine: Any, tokenizer: Tokenizer, *, merge_adapters: bool = True) -> None:
    """Write the folder that ``args`` asks for, if it does; a collective call."""
    from ds_decoupled.models import to_hugging_face

    if args.output is None:
        return
    dtype = args.output_dtype or "source"
    to_hugging_face(engine, args.output, merge_adapters=merge_adapters, max_shard_size=args.max_shard_size or "50GB",
                    dtype="source" if dtype == "source" else getattr(torch, dtype))
    if dist.get_rank() == 0:
        tokenizer.save(Path(args.output))
        print(f"saved: {args.output}")


def check_shard_size(size: str | None) -> None:
    """Raises :class:`ConfigError` for what is no size of a file."""
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size or "50GB")
    except ValueError as error:
        raise ConfigError("--max_shard_size", size, f"it is no size ({error})", 'Give, for example, "5GB"') from error


def _configuration(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # what a file that is none raises depends on what is in it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("--model", name, f"transformers finds no configuration there ({reason})",
                          'A config.json with at least a "model_type" is needed') from error


def _check_method(block: DecoupledConfig | None) -> None:
    if block is None or block.axes().recover != "reconstruct":
        return
    instead = ('Take "backprop": the same gradients, activations kept' if block.axes().flush else
               'Take "dsp", which keeps a stage\'s input and runs it again, or "delayed", which keeps its activations')
    raise ConfigError("decoupled.method", block.method, "it rebuilds a stage's input from its output, and the layers of this "
                      "model cannot be undone: each adds to its input, x + f(x)", instead)


def _check_tied(block: DecoupledConfig | None) -> None:
    if block is None or block.is_plain_backprop:
        return
    raise ConfigError("decoupled.method", block.method, "the model's embedding and unembedding are one tensor, and the two "
                      "stages that hold it step at different times",
                      'Give --untie_embeddings: two tensors, which start alike; or take "backprop"')


def _check_adapters(layers: list[Any], peft_config: Any) -> None:
    with torch.device("meta"):  # without weights
        decoder_layer = layers[1].build()
    if not any(parameter.requires_grad for parameter in decoder_layer.parameters()):
        linear = {path.rpartition(".")[2] for path, part in decoder_layer.named_modules()
                  if isinstance(part, torch.nn.Linear) or type(part).__name__ == "Conv1D"}
        raise ConfigError("--lora_targets", sorted(peft_config.target_modules), "no layer of this model has such a name",
                          f"It has {', '.join(sorted(linear))}; all-linear takes all of them")


def _check_left_over(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Bytes write no files: those of a tokenizer that is there would be loaded with the model."""
    if args.output is None or not isinstance(tokenizer, Bytes):
        return
    if left := [name for name in TOKENIZER_FILES if Path(args.output, name).is_file()]:
        raise ConfigError("--output", args.output, f"it holds a tokenizer ({left[0]}), and this model is trained on bytes",
                          "Give another folder, or take it out")


def _check_sizes(args: argparse.Namespace, config: Any, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError("--tokenizer", args.tokenizer or tokenizer.name, f"it has {tokenizer.vocab_size} tokens, and the "
                          f"model's vocabulary {config.vocab_size}", "Give the tokenizer that the model was trained with")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and args.sequence_length > limit:
        raise ConfigError("--sequence_length", args.sequence_length, f"the model has {limit} positions",
                          "Take shorter sequences")
