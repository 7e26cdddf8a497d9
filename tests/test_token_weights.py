"""Every token of an update weighs the same, whatever micro-batch, rank and replica it is on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recipe_runs import config_file, run
from tiny_lm import save_tiny

from data.examples import NOT_ASKED
from data.token_weights import TokenWeights
from ds_decoupled.models import next_token_loss

LENGTH, RATE = 24, 0.5


def rows(count: int) -> list[dict[str, str]]:
    """Completions of 1 to 16 letters, so that means over micro-batches would weigh tokens differently."""
    return [{"prompt": f"{i:02d}", "completion": "abcdefghijklmnop"[:1 + (i * i) % 16]} for i in range(count)]


def written(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def test_loss() -> None:
    """Of parts, divided by the mean number of tokens, the mean is the loss of the whole."""
    logits, targets = torch.randn(4, 5, 7), torch.randint(7, (4, 5))
    targets[:3, 1:] = NOT_ASKED
    tokens = torch.tensor([int((targets != NOT_ASKED).sum()) / 2])
    parts = [next_token_loss(logits[a:a + 2], (targets[a:a + 2], tokens)) for a in (0, 2)]
    assert torch.stack(parts).mean().item() == pytest.approx(next_token_loss(logits, targets).item(), rel=1e-6)


def test_weights() -> None:
    """Replicas have their rows, and one number for the whole update."""
    batches = [(torch.arange(8).view(4, 2) + 10 * i, torch.full((4, 2), NOT_ASKED)) for i in range(4)]
    batches[0][1][0] = 5
    batches[3][1][:, 1] = 6
    parts = []
    for replica in (0, 1):
        loader = TokenWeights(iter(batches), 2, replica, 2)
        parts.append([next(loader) for _ in range(4)])
    for i in range(4):
        assert torch.equal(torch.cat([parts[0][i][0], parts[1][i][0]]), batches[i][0])
        assert [part[i][1][1].item() for part in parts] == [2 / 4 if i < 2 else 4 / 4] * 2


@pytest.mark.parametrize(("method", "ranks", "pipe_ranks", "k"), [
    ("backprop", 1, 1, 4), ("backprop", 2, 1, 2), ("delayed", 2, 2, 4), ("dsp", 2, 1, 2)])
def test_an_update(method: str, ranks: int, pipe_ranks: int, k: int, tmp_path: Path) -> None:
    """One update of all rows, against the model's own loss over all of their tokens at once."""
    from transformers import AutoModelForCausalLM

    model, output, config = save_tiny(tmp_path / "llama"), tmp_path / "tuned", tmp_path / "config.json"
    config.write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": k, "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": RATE}}, "steps_per_print": 1000000,
        "decoupled": {"method": method, "stages": 2}}))
    run("finetune_lm", tmp_path, "--deepspeed_config", config, "--model", model, "--data", written(tmp_path / "a.jsonl", 16),
        "--validation", written(tmp_path / "b.jsonl", 4), "--max_length", str(LENGTH), "--micro_batches", str(k), "--warmup",
        "0", "--sample", "0", "--output", output, "--pipe_ranks", str(pipe_ranks), ranks=ranks)
    plain = AutoModelForCausalLM.from_pretrained(model)
    total, count = torch.zeros(()), 0
    for row in rows(16):
        ids, learned = torch.tensor(list((row["prompt"] + row["completion"] + "\n").encode())), len(row["completion"]) + 1
        logits = plain(ids[None, :-1]).logits[0]
        total = total + F.cross_entropy(logits[-learned:], ids[-learned:], reduction="sum")
        count += learned
    (total / count).backward()
    tuned = dict(AutoModelForCausalLM.from_pretrained(output).named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        change = tuned[name].detach() - parameter.detach()
        assert torch.allclose(change, -RATE * parameter.grad, rtol=1e-3, atol=1e-6), name


TAUGHT = {"head": "lens:1", "head_teaching": {"updates": 2, "lr": 3e-3}}


@pytest.mark.parametrize(("method", "ranks", "block"), [
    ("dgl", 2, {"stages": 2, **TAUGHT}), ("overlapping", 2, {"stages": 4, "losses": "farthest", **TAUGHT}),
    ("dgl", 1, {"stages": 2}), ("pd_asgd", 1, {"stages": 2})])
def test_methods_take_them(method: str, ranks: int, block: dict[str, Any], tmp_path: Path) -> None:
    """Targets with their weight go wherever targets go: to heads, to their teaching, over links, to threads."""
    model = save_tiny(tmp_path / "llama", num_hidden_layers=6)
    results = run("finetune_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, method, **block), "--model", model,
                  "--data", written(tmp_path / "a.jsonl", 40), "--validation", written(tmp_path / "b.jsonl", 8),
                  "--max_length", str(LENGTH), "--micro_batches", "40", "--evaluations", "2", "--sample", "0", ranks=ranks)
    assert results["validation_loss"] < results["validation_loss_before"] - 0.5
