"""Small causal language models of ``transformers``, with and without a tokenizer, saved as ``save_pretrained`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXT = "the quick brown fox jumps over the lazy dog and runs away. "


def tiny_config(family: str = "llama", vocab_size: int = 256, **changes: Any) -> Any:
    """About 10 thousand parameters, 64 positions."""
    from transformers import AutoConfig

    sizes: dict[str, dict[str, Any]] = {
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    }
    given = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None, **changes}
    return AutoConfig.for_model(family, **{**sizes[family], **given})


def save_tiny(folder: Path, family: str = "llama", vocab_size: int = 256, **changes: Any) -> Path:
    """A fresh model in ``folder``, as safetensors."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(tiny_config(family, vocab_size, **changes)).save_pretrained(folder)
    return folder


def save_words(folder: Path, text: str = TEXT) -> int:
    """A tokenizer of the words of ``text`` in ``folder``, with an end-of-text token; returns how many tokens it has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<unknown>", *dict.fromkeys(text.replace(".", " . ").split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>").save_pretrained(folder)
    return len(words)


def validation_loss(model: Any, ids: list[int], sequence: int, micro_batch: int, limit: int) -> float:
    """Mean loss of the last tenth of ``ids`` in windows one after another, as the recipes validate, by the model itself."""
    tail = torch.tensor(ids[len(ids) * 9 // 10:])
    losses = []
    for start in range(0, len(tail) - sequence, sequence):
        window = tail[start:start + sequence + 1]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    losses = losses[:limit * micro_batch]
    return sum(losses) / len(losses)
