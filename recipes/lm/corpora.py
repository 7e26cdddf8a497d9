"""What a recipe for language models trains on and validates on, as its arguments name it."""

from __future__ import annotations

import argparse

import torch.distributed as dist

from data.examples import Instructions
from data.files import Rows
from data.stream import BUFFER, Stream, open_stream
from data.text import Documents, read_data
from data.tokens import Tokenizer
from data.windows import Corpus
from ds_decoupled.errors import ConfigError
from run.options import refuse_unused


def read_corpus(args: argparse.Namespace, tokenizer: Tokenizer) -> Corpus | Instructions | Stream:
    """What ``args`` names, cut into windows; on rank 0 it is said how much that is."""
    if args.streaming:
        return read_stream(args, tokenizer)
    refuse_unused(args, ["buffer_size"], "without --streaming all of the data are there", "Leave it out, or give --streaming")
    found = read_data(args.data)
    validation = None if args.validation is None else read_data(args.validation, "--validation")
    if validation is not None and type(validation) is not type(found):
        raise ConfigError("--validation", args.validation, "it is of another kind than --data: one holds texts, the "
                          "other prompts or conversations", "Give both of one kind")
    corpus = windows(args, tokenizer, found, validation)
    if dist.get_rank() == 0:
        print(corpus.told(found))  # type: ignore[arg-type]
    return corpus


def windows(args: argparse.Namespace, tokenizer: Tokenizer, found: Documents | Rows,
            validation: Documents | Rows | None) -> Corpus | Instructions:
    """Of ``found`` to train on, and of ``validation`` or of the end of ``found`` to validate on."""
    if isinstance(found, Rows):
        return Instructions.of(found, tokenizer, args.sequence_length, completion_only=args.completion_only_loss is not False,
                               packing=args.packing, validation=validation if isinstance(validation, Rows) else None)
    refuse_unused(args, {"packing": False, "completion_only_loss": None}, "it is for rows of prompts or conversations, and "
                  f"{args.data} holds texts, which are packed and learned as a whole")
    return Corpus.of(found, tokenizer, args.sequence_length, validation if isinstance(validation, Documents) else None)


def read_stream(args: argparse.Namespace, tokenizer: Tokenizer) -> Stream:
    """Rows as they come, and what is validated on, as a whole."""
    if args.validation is None:
        raise ConfigError("--streaming", True, "nobody knows where the last tenth of a stream begins", "Give --validation")
    others = read_data(args.validation, "--validation")
    try:
        held = windows(args, tokenizer, others, others)
    except ConfigError as error:
        field, *rest = error.fields
        raise ConfigError("--validation" if field == "--data" else field, *rest) from error
    stream = open_stream(args.data, tokenizer, held, completion_only=args.completion_only_loss is not False,
                         packing=args.packing, buffer=args.buffer_size or BUFFER)
    if dist.get_rank() == 0:
        print(stream.told())
    return stream
