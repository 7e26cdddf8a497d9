"""Tokenizers: bytes, or one of ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from data.hub import reached_or_offline
from ds_decoupled.errors import ConfigError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


class Tokenizer(Protocol):
    """What the recipes need of a tokenizer."""

    name: str
    vocab_size: int

    def encode(self, documents: list[str]) -> list[int]:
        """All documents behind one another."""

    def tokens(self, text: str) -> list[int]:
        """One text, with nothing before or behind it."""

    def end(self) -> list[int]:
        """What stands behind a text that is over."""

    def chat(self, messages: list[dict[str, Any]], *, answers: bool) -> list[int]:
        """A conversation by the tokenizer's template; with ``answers`` up to where the assistant begins to speak."""

    def decode(self, ids: list[int]) -> str: ...

    def save(self, folder: Path) -> None:
        """Write what :func:`tokenizer_of` finds there."""


class Bytes:
    """Every byte of UTF-8 is a token, 256 of them (``transformers``' ByT5 adds three); documents are lines apart."""

    name = "bytes"
    vocab_size = 256

    def encode(self, documents: list[str]) -> list[int]:
        return list("\n".join(documents).encode())

    def tokens(self, text: str) -> list[int]:
        return list(text.encode())

    def end(self) -> list[int]:
        return [10]  # a line

    def chat(self, messages: list[dict[str, Any]], *, answers: bool) -> list[int]:
        raise ConfigError("--tokenizer", self.name, "conversations need a tokenizer with a chat template",
                          "Give one, or rows of prompt and completion")

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Nothing: without a tokenizer, bytes are taken."""


class HuggingFaceTokenizer:
    """A tokenizer of ``transformers``, by folder or hub name; its end-of-text token, if it has one, parts documents."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            with reached_or_offline(name):
                self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError("--tokenizer", name, f"no tokenizer can be loaded from there ({reason})",
                              'Give a folder, a hub name, or "bytes"') from error
        self.name, self.vocab_size = name, len(self._tokenizer)

    def encode(self, documents: list[str]) -> list[int]:
        border, ids = self.end(), self.tokens(documents[0])
        for document in documents[1:]:
            ids += border + self.tokens(document)
        return ids

    def end(self) -> list[int]:
        end = self._tokenizer.eos_token_id
        return self.tokens("\n") if end is None else [end]

    def chat(self, messages: list[dict[str, Any]], *, answers: bool) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answers)
        except Exception as error:  # no template, or one that refuses these messages in words of its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError("--tokenizer", self.name, f"it cannot write a conversation ({reason})",
                              "Give a tokenizer with a chat template, or rows of prompt and completion") from error
        return self.tokens(text)

    def tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


def tokenizer_of(name: str | None, model: str | None = None) -> Tokenizer:
    """The tokenizer called ``name`` (``bytes``, a folder, a hub name); without a name the model's own, if it has one, or bytes.

    Args:
        model: a folder, a file in one, or a hub name.
    """
    if name is None and model is not None:
        place = Path(model)
        folder = place.parent if place.is_file() else place
        name = model if not folder.exists() or any((folder / file).is_file() for file in TOKENIZER_FILES) else None
    return Bytes() if name in (None, "bytes") else HuggingFaceTokenizer(str(name))
