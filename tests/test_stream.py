"""Data that are read row by row: what comes, in which order, for whom, and what is refused."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
import worlds
from recipe_runs import config_file, run

from data.examples import NOT_ASKED, Instructions
from data.files import Rows
from data.stream import Stream, open_stream
from data.tokens import Bytes
from data.windows import Corpus
from ds_decoupled.errors import ConfigError

HELD = Corpus(torch.arange(50), torch.arange(50))


def texts(path: Path, count: int = 40) -> Path:
    path.write_text("".join(json.dumps({"text": f"row {i:02d}"}) + "\n" for i in range(count)))
    return path


def examples(path: Path, count: int = 12) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{i:02d}", "completion": "yes"}) + "\n" for i in range(count)))
    return path


def held_examples() -> Instructions:
    rows = Rows([{"prompt": "a", "completion": "b"}] * 2)
    return Instructions.of(rows, Bytes(), 8, completion_only=True, packing=False, validation=rows)


def of(path: Path, buffer: int = 10, packing: bool = False, held: Corpus | Instructions = HELD) -> Stream:
    return open_stream(str(path), Bytes(), held, completion_only=True, packing=packing, buffer=buffer)


def test_every_row_once_an_epoch(tmp_path: Path) -> None:
    """Packed one behind another, each ended by a line, in another order in every epoch."""
    loader = of(texts(tmp_path / "a.jsonl")).loader(1, 7, seed=0, replica=0, replicas=1)
    epochs = [bytes(token for ids, _ in islice(loader, 40) for token in ids[0].tolist()).decode() for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch.rstrip("\0").split("\n")) == [f"row {i:02d}" for i in range(40)]
    assert epochs[0] != epochs[1] and epochs[0].split("\n") != sorted(epochs[0].split("\n"))


def test_replicas_share_and_seek_resumes(tmp_path: Path) -> None:
    """Two replicas have the rows of one with twice the micro-batch; what comes is a function of the position."""
    stream = of(examples(tmp_path / "a.jsonl"), held=held_examples())
    whole = list(islice(stream.loader(4, 8, seed=3, replica=0, replicas=1), 7))
    halves = [list(islice(stream.loader(2, 8, seed=3, replica=r, replicas=2), 7)) for r in (0, 1)]
    for i in range(7):
        for part in (0, 1):
            assert torch.equal(whole[i][part], torch.cat([halves[0][i][part], halves[1][i][part]]))
    resumed = stream.loader(4, 8, seed=3, replica=0, replicas=1)
    resumed.seek(5)
    assert torch.equal(next(resumed)[0], whole[5][0])
    other = next(stream.loader(4, 8, seed=4, replica=0, replicas=1))
    assert not torch.equal(other[0], whole[0][0])


def test_completions_alone(tmp_path: Path) -> None:
    """Targets of the prompt are not asked for, as where all rows are held."""
    ids, targets = next(of(examples(tmp_path / "a.jsonl"), held=held_examples()).loader(1, 8, seed=0, replica=0, replicas=1))
    assert bytes(ids[0, :5].tolist())[2:] == b"yes" and targets[0, 0] == NOT_ASKED
    assert bytes(targets[0, 1:5].tolist()) == b"yes\n" and (targets[0, 5:] == NOT_ASKED).all()


@pytest.mark.parametrize("kind", ["gz", "folder", "txt", "parquet"])
def test_kinds(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "data"
    if kind == "gz":
        place = tmp_path / "a.jsonl.gz"
        place.write_bytes(gzip.compress(texts(tmp_path / "plain").read_bytes()))
    elif kind == "parquet":
        import datasets

        place = tmp_path / "a.parquet"
        datasets.Dataset.from_list([{"text": f"row {i:02d}"} for i in range(40)]).to_parquet(place)
    else:
        place.mkdir()
        if kind == "folder":
            texts(place / "a.jsonl", 20)
            texts(place / "b.jsonl", 20)
        else:
            for i in range(40):  # a document each, lines and all
                (place / f"{i}.txt").write_text(f"row\n{i:02d}")
    loader = of(place).loader(1, 7, seed=0, replica=0, replicas=1)
    text = bytes(token for ids, _ in islice(loader, 40) for token in ids[0].tolist()).decode()
    assert text.count("row") == 40 and (kind != "txt" or "row\n07\n" in text)


def test_recipe(tmp_path: Path) -> None:
    """On two ranks as on one, and resumed as if never stopped."""
    data, held = texts(tmp_path / "a.jsonl", 200), texts(tmp_path / "held.jsonl", 30)
    arguments = ("--deepspeed_config", config_file(tmp_path, "petra"), "--data", data, "--validation", held, "--streaming",
                 "--buffer_size", "16", "--blocks", "1", "--sequence_length", "16", "--micro_batches", "24",
                 "--evaluations", "3", "--sample", "0")
    saved = tmp_path / "saved"
    one = run("train_lm", tmp_path, *arguments, "--save_checkpoint", saved, "--save_every", "1")
    (saved / "latest").write_text("update4")
    resumed = run("train_lm", tmp_path, *arguments, "--resume", saved)
    two = run("train_lm", tmp_path, *arguments, ranks=2)
    assert resumed["curves"]["validation_loss"] == one["curves"]["validation_loss"] and one["epochs"] is None
    assert two["curves"]["validation_loss"] == pytest.approx(one["curves"]["validation_loss"], rel=1e-5)


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another kind"):
        of(examples(tmp_path / "a.jsonl"))
    (tmp_path / "other.jsonl").write_text('{"words": "a"}\n')
    with pytest.raises(ConfigError, match="one of them must be 'text'"):
        of(tmp_path / "other.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="--data"):
        of(tmp_path / "empty.jsonl")
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(ConfigError, match="of no known kind"):
        of(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match="anything to be learned"):
        next(of(examples(tmp_path / "b.jsonl"), held=held_examples()).loader(1, 1, seed=0, replica=0, replicas=1))
    with pytest.raises(worlds.RankFailed, match="Give --validation"):
        run("train_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, "petra"), "--data", texts(tmp_path / "c.jsonl"),
            "--streaming", "--sample", "0")
    with pytest.raises(worlds.RankFailed, match="Give --micro_batches"):
        run("train_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, "petra"), "--data", texts(tmp_path / "c.jsonl"),
            "--validation", texts(tmp_path / "d.jsonl"), "--streaming", "--sample", "0", "--epochs", "1")
    with pytest.raises(worlds.RankFailed, match="Leave it out, or give --streaming"):
        run("train_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, "petra"), "--data", texts(tmp_path / "c.jsonl"),
            "--buffer_size", "4", "--sample", "0")
