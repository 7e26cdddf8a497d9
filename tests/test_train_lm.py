"""Training language models from scratch: the recipe end to end, and the text that it reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import worlds
from recipe_runs import config_file, launch, run, without_seconds
from tiny_lm import TEXT, save_words, tiny_config, validation_loss

from data.text import read_text
from data.tokens import Bytes, tokenizer_of
from data.windows import Corpus, RandomWindows, in_order
from ds_decoupled.errors import ConfigError

FIELDS = {"method", "model", "data", "stages", "pipe_ranks", "seed", "epochs", "train_loss", "validation_loss", "perplexity",
          "samples_per_second", "tokens_per_second", "peak_memory_bytes", "bytes_sent_per_sample", "delays", "config", "sample"}
SHORT = ("--sequence_length", "16", "--micro_batches", "24", "--evaluations", "3", "--eval_micro_batches", "5", "--sample", "0")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 60)
    return path


def test_launched(tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    done = launch("train_lm", "--deepspeed_config", config_file(tmp_path, "petra"), "--blocks", "1", *SHORT, "--sample", "10",
                  "--summary", summary, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data: " in done.stdout and " tokens to train on" in done.stdout
    results = json.loads(summary.read_text())
    assert results.keys() >= FIELDS
    assert (results["method"], results["stages"], results["pipe_ranks"], results["data"]) == ("petra", 4, 2, "topics")
    assert results["perplexity"] == pytest.approx(math.exp(results["validation_loss"])) and results["validation_loss"] < 5.2
    assert results["curves"]["tokens"] == [8 * 4 * 16, 16 * 4 * 16, 24 * 4 * 16]
    assert results["tokens_per_second"] == pytest.approx(16 * results["samples_per_second"])
    assert "a sample" in done.stdout and results["sample"] in done.stdout
    assert summary.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize("method", ["petra", "backprop", "dgl"])
def test_any_number_of_ranks(method: str, tmp_path: Path, text: Path) -> None:
    """Training, validation and the sample are the same; DeepSpeed's own ranks agree on shapes that change with the sample's."""
    arguments = ("--deepspeed_config", config_file(tmp_path, method), "--data", text, "--blocks", "1", *SHORT, "--sample", "20")
    one, two = (run("train_lm", tmp_path, *arguments, ranks=ranks) for ranks in (1, 2))
    assert one["curves"]["validation_loss"] == pytest.approx(two["curves"]["validation_loss"], rel=1e-5)
    assert one["sample"] == two["sample"] and len(one["sample"]) == 16 + 20
    if method != "petra":  # where ranks have told of other micro-batches at the end of a stretch
        assert one["curves"]["train_loss"] == pytest.approx(two["curves"]["train_loss"], rel=1e-5)


def test_learns_and_speaks(tmp_path: Path, text: Path) -> None:
    results = run("train_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, "reversible", k=1), "--data",
                  text, "--sequence_length", "32", "--micro_batches", "100", "--lr", "6e-3", "--blocks", "1", "--sample", "60",
                  "--eval_micro_batches", "2")
    assert results["validation_loss"] < 0.3 and results["reversible"]
    assert results["sample"] in TEXT * 3


@pytest.mark.parametrize("method, ranks", [("petra", 2), ("backprop", 1)])
def test_resumes(method: str, ranks: int, tmp_path: Path, text: Path) -> None:
    """As a run that was stopped after its first evaluation, with micro-batches in flight."""
    arguments = ("--deepspeed_config", config_file(tmp_path, method), "--data", text, "--blocks", "1", *SHORT)
    saved = tmp_path / "saved"
    whole = run("train_lm", tmp_path, *arguments, "--save_checkpoint", saved, "--save_every", "1", ranks=ranks)
    assert (saved / "latest").read_text() == "update12"
    (saved / "latest").write_text("update4")
    resumed = run("train_lm", tmp_path, *arguments, "--resume", saved, ranks=ranks)
    assert without_seconds(resumed) == without_seconds(whole)
    assert resumed["samples_per_second"] > 0


def test_new_model_of_transformers(tmp_path: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = tmp_path / "llama" / "config.json"
    tiny_config().save_pretrained(config.parent)
    output = tmp_path / "trained"
    results = run("train_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, "delayed"), "--data", text, *SHORT,
                  "--model", config, "--output", output, ranks=2)
    assert results["stages"] == 4 and not results["reversible"] and results["validation_loss"] < 5.2
    by_rank = results["peak_memory_bytes_by_rank"]
    assert len(by_rank) == 2 and max(by_rank) == results["peak_memory_bytes"]
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    assert validation_loss(model, list(text.read_bytes()), 16, 4, 5) == pytest.approx(results["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("changes, words", [
    (["--data", "/none/text.txt"], ["--data", "no such file"]),
    (["--data", "EMPTY"], ["--data", "no text files"]),
    (["--data", "SHORT"], ["--sequence_length", "15 tokens"]),
    (["--data", "nobody/nothing"], ["--data", "not a data set that can be loaded"]),
    (["--model", "huge"], ["--model", "tiny, small, medium"]),
    (["--model", "EMPTY", "--deepspeed_config", "DELAYED"], ["--model", "no configuration"]),
    (["--model", "EMPTY"], ["decoupled.method", "petra", "delayed"]),
    (["--output", "out"], ["--output", "config.json"]),
    (["--micro_batches", "1"], ["--micro_batches", "k = 2"]),
    (["--tokenizer", "EMPTY"], ["--tokenizer", "bytes"]),
    (["--resume", "EMPTY"], ["--resume", "no checkpoint"]),
])
def test_bad_arguments(changes: list[str], words: list[str], tmp_path: Path, text: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("fifteen letters")
    places = {"EMPTY": str(tmp_path / "empty"), "SHORT": str(tmp_path / "short.txt"),
              "DELAYED": str(config_file(tmp_path, "delayed"))}
    with pytest.raises(worlds.RankFailed) as failure:
        run("train_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, "petra"), "--data", text, *SHORT,
            *(places.get(c, c) for c in changes))
    for word in words:
        assert word in str(failure.value)
    assert "SystemExit" in str(failure.value)  # the message alone, no traceback for the user


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text("first")
    (tmp_path / "a" / "a.bin").write_bytes(b"\0")
    assert read_text(str(tmp_path)) == ["first", "second"]
    assert len(read_text("topics")) > 50


@pytest.mark.parametrize("words", [False, True])
def test_tokenizers(words: bool, tmp_path: Path) -> None:
    if words:
        count = save_words(tmp_path)
        tokenizer: Any = tokenizer_of(None, str(tmp_path))
        assert tokenizer.vocab_size == count
        assert tokenizer.encode(["the dog", "runs"]) == [2, 9, 0, 11]
        (tmp_path / "again").mkdir()
        tokenizer.save(tmp_path / "again")
        assert tokenizer_of(None, str(tmp_path / "again")).encode(["the dog"]) == [2, 9]
        assert tokenizer_of("bytes", str(tmp_path)).vocab_size == 256
        return
    tokenizer = tokenizer_of(None, str(tmp_path))  # a folder without a tokenizer
    assert tokenizer.encode(["ä", "b"]) == [195, 164, 10, 98]
    assert tokenizer.decode(tokenizer.encode(["ä", "b"])) == "ä\nb"


def test_corpus() -> None:
    """Nine tenths to train on; windows are where they say, and validation takes every window once."""
    corpus = Corpus.of(["0123456789" * 10], Bytes(), 4)
    assert len(corpus.train) == 90 and len(corpus.validation) == 10
    batches = in_order(corpus.validation, 1, 4, 9)
    assert [(x.tolist(), y.tolist()) for x, y in batches] == [([[48, 49, 50, 51]], [[49, 50, 51, 52]]),
                                                              ([[52, 53, 54, 55]], [[53, 54, 55, 56]])]
    windows = RandomWindows(corpus.train, 2, 4, seed=1)
    ids, targets = next(windows)
    assert ids.shape == targets.shape == (2, 4) and (ids[:, 1:] == targets[:, :-1]).all()
    with pytest.raises(ConfigError, match="--sequence_length"):
        Corpus.of(["0123456789" * 4], Bytes(), 4)
