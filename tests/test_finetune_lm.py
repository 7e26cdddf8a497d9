"""Fine-tuning language models of transformers: the recipe end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import worlds
from recipe_runs import config_file, launch, run
from tiny_lm import TEXT, save_tiny, save_words, validation_loss

SHORT = ("--sequence_length", "16", "--micro_batches", "24", "--evaluations", "3", "--eval_micro_batches", "5", "--sample", "0")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 60)
    return path


def test_launched(tmp_path: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, output, summary = save_tiny(tmp_path / "llama"), tmp_path / "tuned", tmp_path / "summary.json"
    done = launch("finetune_lm", "--deepspeed_config", config_file(tmp_path, "delayed"), "--model", model, "--data", text,
                  *SHORT, "--sample", "5", "--output", output, "--summary", summary, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(summary.read_text())
    original, ids = AutoModelForCausalLM.from_pretrained(model).eval(), list(text.read_bytes())
    assert results["method"] == "delayed" and results["stages"] == 4 and results["pipe_ranks"] == 2
    assert results["validation_loss_before"] == pytest.approx(validation_loss(original, ids, 16, 4, 5), rel=1e-4)
    assert results["validation_loss"] < results["validation_loss_before"] - 0.5
    assert results["curves"]["tokens"][0] == 0 and len(results["sample"]) > 0 and results["tokens_per_second"] > 0
    assert summary.with_suffix(".png").stat().st_size > 5000
    tuned = AutoModelForCausalLM.from_pretrained(output).eval()
    assert validation_loss(tuned, list(text.read_bytes()), 16, 4, 5) == pytest.approx(results["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("method, ranks, options", [("backprop", 1, []), ("dsp", 2, ["--untie_embeddings"])])
def test_tied_embeddings(method: str, ranks: int, options: list[str], tmp_path: Path, text: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, output = save_tiny(tmp_path / "gpt2", "gpt2"), tmp_path / "tuned"
    results = run("finetune_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, method), "--model", model, "--data",
                  text, *SHORT, "--output", output, *options, ranks=ranks)
    tuned = AutoModelForCausalLM.from_pretrained(output).eval()
    assert tuned.config.tie_word_embeddings is not bool(options)
    assert validation_loss(tuned, list(text.read_bytes()), 16, 4, 5) == pytest.approx(results["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("method, head, options", [("dgl", "last-layer", []), ("overlapping", "shared:1", []),
                                                   ("dgl", "last-layer", ["--lora_rank", "4"])])
def test_local_losses(method: str, head: str, options: list[str], tmp_path: Path, text: Path) -> None:
    """Every stage by a head of its own, which starts from the model's; what is written knows nothing of heads."""
    from transformers import AutoModelForCausalLM

    model, output = save_tiny(tmp_path / "llama"), tmp_path / "tuned"
    config = config_file(tmp_path, method, head=head)
    results = run("finetune_lm", tmp_path, "--deepspeed_config", config, "--model", model, "--data", text, *SHORT, "--output",
                  output, *options, ranks=2)
    assert results["validation_loss"] < results["validation_loss_before"] - (0.01 if options else 0.3)
    stages = results["stage_curves"]["loss"]
    assert list(stages) == [f"stage {s}" for s in range(results["stages"])]
    if not options:  # adapters learn too little in so few steps; the first entry is from before all training
        assert all(losses[-1] < losses[1] for losses in stages.values())
    tuned = AutoModelForCausalLM.from_pretrained(output).eval()
    assert validation_loss(tuned, list(text.read_bytes()), 16, 4, 5) == pytest.approx(results["validation_loss"], rel=1e-4)


def test_taught_heads(tmp_path: Path, text: Path) -> None:
    """Heads are taught first, as part of the run, and the upper stages learn; a run that was cut off there goes on."""
    model, saved = save_tiny(tmp_path / "llama", num_hidden_layers=6), tmp_path / "saved"
    teaching = {"updates": 6, "lr": 3e-3}
    config = config_file(tmp_path, "overlapping", stages=3, losses="farthest", head="lens:1", head_lr=4.0,
                         head_teaching=teaching)
    arguments = ("--deepspeed_config", config, "--model", model, "--data", text, *SHORT, "--sample", "0")
    whole = run("finetune_lm", tmp_path, *arguments, "--save_checkpoint", saved, "--save_every", "1", ranks=2)
    first, taught, *_, last = whole["curves"]["validation_loss"]
    assert first - 0.3 > taught - 0.2 > last and whole["updates"] == [12, 12, 12]
    told = whole["head_teaching"]
    assert told["updates"] == 6 and list(told["losses"]) == ["1"] and len(told["losses"]["1"]) == 6
    assert told["losses"]["1"][-1] < told["losses"]["1"][0]
    (saved / "latest").write_text("update4")
    resumed = run("finetune_lm", tmp_path, *arguments, "--resume", saved)
    assert resumed["curves"]["validation_loss"] == pytest.approx(whole["curves"]["validation_loss"], rel=1e-6)
    with pytest.raises(worlds.RankFailed, match="decoupled.head_teaching.updates.*the run has 6 updates"):
        run("finetune_lm", tmp_path, *arguments, "--micro_batches", "12", "--evaluations", "1")


@pytest.mark.parametrize("adapters_only, ranks", [(False, 1), (True, 2)])
def test_adapters(adapters_only: bool, ranks: int, tmp_path: Path, text: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, output = save_tiny(tmp_path / "gpt2", "gpt2"), tmp_path / "tuned"
    results = run("finetune_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, "delayed"), "--model", model, "--data",
                  text, *SHORT, "--lora_rank", "4", "--output", output, *(["--adapters_only"] if adapters_only else []),
                  ranks=ranks)
    assert results["validation_loss"] < results["validation_loss_before"]
    if adapters_only:
        assert not (output / "model.safetensors").exists()
        base = AutoModelForCausalLM.from_pretrained(model)
        tuned = PeftModel.from_pretrained(base, output).eval()
    else:
        tuned = AutoModelForCausalLM.from_pretrained(output).eval()
    assert validation_loss(tuned, list(text.read_bytes()), 16, 4, 5) == pytest.approx(results["validation_loss"], rel=1e-4)


def test_tokenizer_of_the_model(tmp_path: Path, text: Path) -> None:
    """It is used, and goes with the model; a vocabulary may be larger than the tokenizer's."""
    from transformers import AutoTokenizer

    folder = tmp_path / "words"
    count = save_words(folder)
    save_tiny(folder, vocab_size=count + 3)
    results = run("finetune_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, "dsp"), "--model", folder, "--data",
                  text, *SHORT, "--sample", "10", "--sequence_length", "8", "--output", tmp_path / "tuned")
    assert results["validation_loss_before"] < 4 and len(results["sample"].split()) == 16 + 10
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned").tokenize("the dog") == ["the", "dog"]


@pytest.mark.parametrize("adapters", [[], ["--lora_rank", "2"]])
def test_resumes(adapters: list[str], tmp_path: Path, text: Path) -> None:
    model, saved = save_tiny(tmp_path / "llama"), tmp_path / "saved"
    arguments = ("--deepspeed_config", config_file(tmp_path, "delayed"), "--model", model, "--data", text, *SHORT, *adapters)
    whole = run("finetune_lm", tmp_path, *arguments, "--save_checkpoint", saved, "--save_every", "1", ranks=2)
    (saved / "latest").write_text("update4")
    resumed = run("finetune_lm", tmp_path, *arguments, "--resume", saved, ranks=2)
    assert resumed["curves"]["validation_loss"] == whole["curves"]["validation_loss"]


def test_what_a_resumed_run_cannot_follow(tmp_path: Path, text: Path) -> None:
    """It would go on with the rate of the run that saved it, and with its layers; how long it is may change."""
    model, saved = save_tiny(tmp_path / "llama"), tmp_path / "saved"
    common = ("finetune_lm", tmp_path, "--model", model, "--data", text, *SHORT)
    first = config_file(tmp_path, "delayed")
    again = ("--lora_rank", "2", "--lr", "1e-3")
    run(*common, "--deepspeed_config", first, *again, "--micro_batches", "12", "--save_checkpoint", saved)
    other = tmp_path / "other.json"
    settings = json.loads(first.read_text())
    settings["optimizer"]["params"]["weight_decay"] = 0.5
    other.write_text(json.dumps(settings))
    for config, changes, words in (
        (first, [*again, "--lr", "2e-3"], ['"--lr": 0.002', "had 0.001"]),
        (first, ["--lora_rank", "2"], ['"--lr": 0.003', "had 0.001"]),
        (first, [*again, "--lora_rank", "4"], ['"--lora_rank": 4', "had 2"]),
        (first, [*again, "--seed", "3"], ['"--seed": 3', "had 0"]),
        (other, [*again], ['"optimizer"', "weight_decay"]),
    ):
        with pytest.raises(worlds.RankFailed) as failure:
            run(*common, "--deepspeed_config", config, *changes, "--resume", saved, ranks=2)
        assert all("SystemExit" in str(error) and "cannot follow" in str(error) for error in failure.value.errors)
        assert all(word in str(failure.value) for word in words), (words, str(failure.value))
    moved = text.rename(tmp_path / "elsewhere" / "text.txt") if (tmp_path / "elsewhere").mkdir() is None else text
    longer = run(*common, "--data", moved, "--deepspeed_config", first, *again, "--resume", saved, ranks=2)
    assert longer["curves"]["tokens"][-1] == 24 * 4 * 16


@pytest.mark.parametrize("method, changes, words", [
    ("petra", [], ["decoupled.method", "petra", "cannot be undone", "dsp", "delayed"]),
    ("reversible", [], ["decoupled.method", "reversible", "backprop"]),
    ("delayed", ["--model", "TIED"], ["one tensor", "--untie_embeddings", "backprop"]),
    ("dsp", ["--model", "/none"], ["no such folder"]),
    ("dsp", ["--model", "SMALL"], ["--tokenizer", "bytes", "256 tokens", "vocabulary 61"]),
    ("dsp", ["--sequence_length", "65"], ["--sequence_length", "64 positions"]),
    ("dsp", ["--lora_alpha", "8"], ["--lora_alpha", "--lora_rank"]),
    ("dsp", ["--lora_rank", "2", "--lora_targets", "nothing"], ["--lora_targets", "nothing"]),
    ("dsp", ["--adapters_only"], ["--adapters_only", "--lora_rank"]),
    ("dsp", ["--output", "FILE"], ["--output", "folder"]),
])
def test_refusals(method: str, changes: list[str], words: list[str], tmp_path: Path, text: Path) -> None:
    makers = {"TIED": lambda: save_tiny(tmp_path / "gpt2", "gpt2"), "FILE": lambda: text,
              "SMALL": lambda: save_tiny(tmp_path / "small", vocab_size=61)}
    model = save_tiny(tmp_path / "llama")
    with pytest.raises(worlds.RankFailed) as failure:
        run("finetune_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, method), "--model", model, "--data", text,
            *SHORT, *(str(makers[c]()) if c in makers else c for c in changes))
    for word in words:
        assert word in str(failure.value)
    assert "SystemExit" in str(failure.value)
