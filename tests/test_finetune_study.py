"""The fine-tuning study: what its runs are, what they come to, and the whole of it on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_lm import TEXT, save_tiny

import finetune_study
from ds_decoupled.config import parse_block
from ds_decoupled.errors import ConfigError
from ds_decoupled.settings import read_json
from studies.finetune_report import differing, lines_of, tables
from studies.finetune_settings import FinetuneSetting, FinetuneStudy, check, settings_of

STUDY = FinetuneStudy("model", "data", updates=4, evaluate_every=2)
TEACHING = '{"head": "lens:1", "head_teaching": {"updates": 2}}'


def run_of(*losses: float) -> dict[str, Any]:
    updates = list(range(0, 2 * len(losses), 2))
    return {"validation_loss": losses[-1], "peak_memory_bytes": 2**21,
            "parameters": {"model": 10, "heads": 5, "read_only": 1},
            "curves": {"updates": updates, "validation_loss": list(losses), "seconds": [float(u) for u in updates]}}


def test_grid() -> None:
    found = settings_of(["dgl"], [2, 3], [TEACHING], [0, 1])
    assert [s.method for s in found] == ["backprop", "dgl", "dgl"] * 2 and len({s.label for s in found}) == 6
    assert found[2].config(STUDY)["decoupled"]["stages"] == 3
    with pytest.raises(ConfigError, match="heads"):
        check([FinetuneSetting("dgl", 2, '{"heads": "lens"}')], STUDY)
    farthest = settings_of(["overlapping"], [2, 4], ['{"losses": "farthest"}'], [0])
    assert [(s.method, s.stages) for s in farthest] == [("backprop", 1), ("overlapping", 4)]


def test_shares() -> None:
    """By hand: backpropagation gains 2 nats, the method 1.5 and 1.7."""
    runs = {FinetuneSetting("backprop"): run_of(5.0, 4.0, 3.0), FinetuneSetting("backprop", seed=1): run_of(5.0, 4.0, 3.0),
            FinetuneSetting("dgl", 2, TEACHING): run_of(5.0, 4.5, 3.5),
            FinetuneSetting("dgl", 2, TEACHING, seed=1): run_of(5.0, 4.5, 3.3),
            FinetuneSetting("dgl", 2, TEACHING, seed=2): run_of(5.0, 4.5, 3.2)}
    backprop, dgl = lines_of(runs)  # seed 2 has nothing to be compared with
    assert backprop.shares == [1.0, 1.0] and dgl.shares == pytest.approx([0.75, 0.85])
    assert "| dgl | 2 |" in tables(runs) and "| 2 | 3.4000 | 0.80 ± 0.07 | 4 | 2 |" in tables(runs)


def test_labels() -> None:
    """In the picture settings are told apart by what is not the same in all."""
    blocks = [TEACHING, '{"head": "lens:1"}', '{"head": "lens:1", "head_lr": 2}']
    assert [differing(block, blocks) for block in blocks] == ['"head_teaching": {"updates": 2}', "", '"head_lr": 2']
    assert differing(TEACHING, [TEACHING]) == ""


def test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command, on a model whose readout is its embedding: runs, table and picture; what is there is not repeated."""
    monkeypatch.setattr(sys, "argv", ["finetune_study.py"])
    (tmp_path / "text.txt").write_text(TEXT * 40)
    model = save_tiny(tmp_path / "llama", num_hidden_layers=3, tie_word_embeddings=True)
    arguments = ["--model", str(model), "--data", str(tmp_path / "text.txt"),
                 "--stages", "2", "--methods", "dgl", "--block", TEACHING, "--updates", "4", "--evaluate_every", "2",
                 "--sequence", "16", "--eval_micro_batches", "2", "--lr", "3e-3", "--output", str(tmp_path / "study.json")]
    finetune_study.main(arguments)
    assert "| dgl | 2 |" in capsys.readouterr().out and (tmp_path / "study.png").stat().st_size > 5000
    backprop, dgl = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert backprop["curves"]["updates"] == [0, 2, 4] and dgl["curves"]["updates"] == [0, 2, 4]
    first, taught, last = dgl["curves"]["validation_loss"]
    assert first > taught > last and first == backprop["curves"]["validation_loss"][0]
    assert dgl["parameters"]["read_only"] == 32 * 256 + 32
    finetune_study.main([*arguments, "--bare"])
    told = capsys.readouterr()
    assert "holds 2 of 3 runs already" in told.err and "| bare | – |" in told.out
    bare = json.loads((tmp_path / "study.json").read_text())["runs"][-1]
    assert bare["curves"]["validation_loss"] == pytest.approx(backprop["curves"]["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["dgl", "overlapping"])
def test_shipped(method: str) -> None:
    """What the study takes by default is what the shipped files say: heads that are taught."""
    shipped = parse_block(read_json(str(Path(__file__).parent.parent / "ds_configs" / f"{method}_lm.json")))
    assert shipped is not None and isinstance(shipped.stages, int) and shipped.head_teaching is not None
    [block] = check([FinetuneSetting(method, shipped.stages, finetune_study.shipped_block(method))], STUDY)
    assert block == shipped
