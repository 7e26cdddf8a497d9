"""Instruction data: which tokens are learned, filled up or packed, and a model fine-tuned on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import config_file, run
from tiny_lm import save_tiny, save_words

from data.examples import NOT_ASKED, Instructions, encode
from data.files import Rows
from data.text import read_data
from data.tokens import Bytes, HuggingFaceTokenizer
from ds_decoupled.errors import ConfigError

TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}ask {{ m.content }} <end> {% else %}say {{ m.content }} <end> "
            "{% endif %}{% endfor %}{% if add_generation_prompt %}say {% endif %}")
FORGETFUL = "{{ messages[-1].content }}"
TALK = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog runs"}, {"role": "user", "content": "lazy"},
        {"role": "assistant", "content": "over"}]


def chatter(folder: Path, template: str = TEMPLATE) -> HuggingFaceTokenizer:
    save_words(folder, "ask say fox dog runs lazy over")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return HuggingFaceTokenizer(str(folder))


def learned(example: Any, tokenizer: Any) -> str:
    return tokenizer.decode([token for token, asked in zip(example.ids, example.asked) if asked])


def test_conversations(tmp_path: Path) -> None:
    """What the assistant says, with the mark that ends it, and not the words that it begins with."""
    tokenizer = chatter(tmp_path)
    example = encode({"messages": TALK}, tokenizer, "here", True)
    assert tokenizer.decode(example.ids) == "ask fox <end> say dog runs <end> ask lazy <end> say over <end>"
    assert learned(example, tokenizer) == "dog runs <end> over <end>"
    assert all(encode({"messages": TALK}, tokenizer, "here", False).asked)
    asked = encode({"prompt": TALK[:3], "completion": TALK[3:]}, tokenizer, "here", True)
    assert asked.ids == example.ids and learned(asked, tokenizer) == "over <end>"


def test_prompt_and_completion(tmp_path: Path) -> None:
    tokenizer = chatter(tmp_path)
    example = encode({"prompt": "fox", "completion": "dog runs"}, tokenizer, "here", True)
    assert tokenizer.decode(example.ids) == "fox dog runs <end>" and learned(example, tokenizer) == "dog runs <end>"
    assert learned(encode({"prompt": "ab", "completion": "cd"}, Bytes(), "here", True), Bytes()) == "cd\n"


ROWS = [{"prompt": "1234", "completion": str(i) * 3} for i in range(10)]


def rows(content: list[dict[str, Any]]) -> Rows:
    found = Rows(content)
    found.place = "here"
    return found


def test_filled_up() -> None:
    data = Instructions.of(rows(ROWS), Bytes(), 9, completion_only=True, packing=False)
    inputs, targets = data.train
    assert inputs.shape == targets.shape == (9, 9) and len(data.validation[0]) == 1
    assert bytes(inputs[2].tolist()) == b"1234222\0\0"
    assert targets[2].tolist() == [NOT_ASKED] * 3 + list(b"222\n") + [NOT_ASKED] * 2
    assert data.prompt(16) == list(b"1234")


def test_cut_and_left_out() -> None:
    """Of a long prompt nothing is left to learn."""
    data = Instructions.of(rows([*ROWS[:8], {"prompt": "x" * 9, "completion": "y"}, ROWS[9]]), Bytes(), 5, completion_only=True,
                           packing=False)
    assert bytes(data.train[1][0, 3:].tolist()) == b"00" and data.dropped == 1 and len(data.train[0]) == 8
    with pytest.raises(ConfigError, match="in the first 2 tokens of none of its 9 rows .*--max_length"):
        Instructions.of(rows(ROWS), Bytes(), 2, completion_only=True, packing=False)


def test_packed() -> None:
    """No token is lost or learned twice: every window's last token is the next one's first."""
    data = Instructions.of(rows(ROWS), Bytes(), 6, completion_only=True, packing=True, validation=rows(ROWS[:2]))
    inputs, targets = data.train
    text = "".join(f"{row['prompt']}{row['completion']}\n" for row in ROWS).encode()
    assert bytes(inputs.flatten().tolist())[:len(text) - 1] == text[:-1]
    known = [token if place % 8 >= 4 else NOT_ASKED for place, token in enumerate(text)][1:]
    assert targets.flatten().tolist()[:len(known)] == known
    assert (targets.flatten()[len(known):] == NOT_ASKED).all()


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a", "completion": 3}, "its prompt is a str and its completion a int"),
    ({"messages": "hello"}, "its messages are no list of objects"),
    ({"messages": [{"content": "hello"}]}, "its messages are no list of objects"),
])
def test_rows_of_another_form(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        encode(row, chatter(tmp_path), "here", True)


def test_templates(tmp_path: Path) -> None:
    save_words(tmp_path / "none")
    with pytest.raises(ConfigError, match="it cannot write a conversation"):
        encode({"messages": TALK}, HuggingFaceTokenizer(str(tmp_path / "none")), "here", True)
    with pytest.raises(ConfigError, match="need a tokenizer with a chat template"):
        encode({"messages": TALK}, Bytes(), "here", True)
    with pytest.raises(ConfigError, match="the first 2 messages of here in another way when more follow"):
        encode({"messages": TALK}, chatter(tmp_path / "forgetful", FORGETFUL), "here", True)


def test_files_of_one_kind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    found = read_data(str(tmp_path))
    assert isinstance(found, Rows) and found == ROWS and found.note == "1 file"
    (tmp_path / "b.jsonl").write_text('{"text": "one"}')
    with pytest.raises(ConfigError, match="some of its files hold texts, and others prompts"):
        read_data(str(tmp_path))


@pytest.mark.parametrize("method, options, epochs", [("delayed", [], 4), ("delayed", ["--packing"], 12.5), ("backprop", [], 4)])
def test_fine_tuned(method: str, options: list[str], epochs: float, tmp_path: Path) -> None:
    """The loss is that of the completions alone, of all rows though they make no whole micro-batches, and falls; two ranks."""
    from transformers import AutoModelForCausalLM

    model = save_tiny(tmp_path / "llama")
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text("\n".join(json.dumps({"prompt": f"{i} + {i} =", "completion": f" {2 * i}"}) for i in range(40)))
    held.write_text("\n".join(json.dumps({"prompt": f"{i} + {i} =", "completion": f" {2 * i}"}) for i in range(40, 50)))
    results = run("finetune_lm", tmp_path, "--deepspeed_config", config_file(tmp_path, method), "--model", model, "--data",
                  train, "--validation", held, "--max_length", "24", "--epochs", str(epochs), "--evaluations", "2", "--sample",
                  "4", *options, ranks=2)
    assert results["validation_loss"] < results["validation_loss_before"] - 1
    assert results["epochs"] == pytest.approx(epochs, rel=0.05)
    if not options:
        original, losses = AutoModelForCausalLM.from_pretrained(model).eval(), []
        for i in range(40, 50):
            prompt, completion = f"{i} + {i} =".encode(), f" {2 * i}\n".encode()
            ids = torch.tensor([list(prompt + completion)])
            with torch.no_grad():
                logits = original(ids[:, :-1]).logits[0, len(prompt) - 1:]
            losses += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt):], reduction="none").tolist()
        assert results["validation_loss_before"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
