"""Language models of transformers, cut into layers: the same logits and gradients, and back again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from deepspeed.pipe import TiedLayerSpec
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ds_decoupled.errors import ConfigError
from ds_decoupled.models import from_hugging_face

SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt_neox": {},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4},
}


def small_config(family: str) -> Any:
    own = OWN[family]
    sizes = {} if family in ("gpt2", "bloom") else SIZES
    return transformers.AutoConfig.for_model(family, **{**sizes, **own}, bos_token_id=1, eos_token_id=2)


def small_model(family: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = small_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases begin with ones and zeros, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def build(layers: list[Any]) -> list[nn.Module]:
    return [layer.build().eval() for layer in layers]


def run(layers: list[nn.Module], inputs: Any) -> Tensor:
    for layer in layers:
        inputs = layer(inputs)
    assert isinstance(inputs, Tensor)
    return inputs


def named_gradients(layers: list[nn.Module]) -> Iterator[tuple[str, Tensor | None]]:
    for layer in layers:
        for name, parameter in layer.root.named_parameters():  # type: ignore[union-attr]
            yield name, parameter.grad


IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", OWN)
def test_logits_and_gradients(family: str) -> None:
    model = small_model(family)
    layers = build(from_hugging_face(model, untie_embeddings=True))
    expected = model(input_ids=IDS).logits
    logits = run(layers, IDS)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (logits * weight).sum().backward()
    own = dict(model.named_parameters())
    grads = dict(named_gradients(layers))
    anatomy = layers[0].conversion.anatomy  # type: ignore[union-attr]
    assert set(grads) - {anatomy.output_weight} == set(own) - {anatomy.output_weight}
    if anatomy.tied:  # two tensors here: their gradients add up to the one of the original
        both, other = grads[anatomy.input_weight], grads.pop(anatomy.output_weight)
        assert both is not None and other is not None
        grads[anatomy.input_weight] = both + other
    for name, grad in grads.items():
        torch.testing.assert_close(grad, own[name].grad, rtol=1e-4, atol=1e-4, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "opt", "bloom"])
def test_attention_mask(family: str) -> None:
    model = small_model(family)
    layers = build(from_hugging_face(model, untie_embeddings=True))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    expected = model(input_ids=IDS, attention_mask=mask).logits
    torch.testing.assert_close(run(layers, (IDS, mask))[0, 4:], expected[0, 4:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(layers, (IDS, mask))[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_position_ids(family: str) -> None:
    model = small_model(family)
    layers = build(from_hugging_face(model, untie_embeddings=True))
    positions = torch.arange(11).flip(0).expand(2, -1).contiguous()
    mask = torch.ones_like(IDS)
    expected = model(input_ids=IDS, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(run(layers, (IDS, mask, positions)), expected, rtol=1e-5, atol=1e-5)


def test_lengths_change() -> None:
    model = small_model("llama")
    layers = build(from_hugging_face(model))
    for length in (11, 5, 11, 1):
        torch.testing.assert_close(run(layers, IDS[:, :length]), model(input_ids=IDS[:, :length]).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_from_folder(family: str, tmp_path: Path) -> None:
    model = small_model(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    layers = build(from_hugging_face(tmp_path, untie_embeddings=True))
    torch.testing.assert_close(run(layers, IDS), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_checkpoint_of_the_model_without_its_head(tmp_path: Path) -> None:
    """As GPT-2's own on the hub: names lack the prefix, and the tied head is missing."""
    model = small_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path)
    layers = build(from_hugging_face(str(tmp_path), untie_embeddings=True))
    torch.testing.assert_close(run(layers, IDS), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_fresh_weights() -> None:
    torch.manual_seed(0)
    layers = build(from_hugging_face(small_config("llama")))
    stds = {name: p.std().item() for layer in layers for name, p in layer.root.named_parameters()}  # type: ignore[union-attr]
    assert stds["model.layers.1.mlp.up_proj.weight"] == pytest.approx(0.02, rel=0.2)
    assert stds["model.norm.weight"] == 0


def test_a_layer_reads_its_own_weights_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_decoupled.models.hugging_face import weights

    small_model("llama").save_pretrained(tmp_path)
    specs = from_hugging_face(tmp_path)
    asked: list[str] = []
    read = weights.SafetensorsFolder.read
    monkeypatch.setattr(weights.SafetensorsFolder, "read", lambda self, names: asked.extend(names) or read(self, names))
    specs[2].build()
    assert asked and all(name.startswith("model.layers.1.") for name in asked)


def test_meta_builds_read_nothing(tmp_path: Path) -> None:
    """To count parameters, layers are built without memory."""
    small_model("llama").save_pretrained(tmp_path)
    specs = from_hugging_face(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with torch.device("meta"):
        built = [spec.build() for spec in specs]
    expected = sum(p.numel() for p in small_model("llama").parameters())
    assert sum(p.numel() for layer in built for p in layer.parameters()) == expected


def test_tied_weights_stay_tied() -> None:
    specs = from_hugging_face(small_model("gpt2"))
    assert isinstance(specs[0], TiedLayerSpec) and isinstance(specs[-1], TiedLayerSpec)
    ends = specs[0].build()
    assert ends.embedding.root.transformer.wte.weight is ends.head.root.lm_head.weight


def test_bf16_leaves_rotary_frequencies_alone() -> None:
    model = small_model("llama")
    layers = [layer.to(torch.bfloat16) for layer in build(from_hugging_face(model))]
    ids = torch.randint(3, 61, (1, 60), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_config(model.config).eval()
    expected.load_state_dict(model.state_dict())
    for parameter in expected.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(run(layers, ids), expected(input_ids=ids).logits)


class TestWhatDoesNotFit:
    def test_encoder_and_decoder(self) -> None:
        config = transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        with pytest.raises(ConfigError, match="causal language model|encoder"):
            from_hugging_face(config)

    def test_recurrent_use_of_layers(self) -> None:
        config = small_config("llama")
        model = AutoModelForCausalLM.from_config(config)
        model.model.layers = model.model.layers[:1]
        with pytest.raises(ConfigError, match="."):
            from_hugging_face(type("Odd", (), {})())

    def test_no_safetensors(self, tmp_path: Path) -> None:
        small_config("llama").save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="safetensors"):
            from_hugging_face(tmp_path)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such folder"):
            from_hugging_face(tmp_path / "nothing")

    def test_another_architecture(self, tmp_path: Path) -> None:
        small_model("llama").save_pretrained(tmp_path)
        small_config("gpt2").save_pretrained(tmp_path)
        specs = from_hugging_face(tmp_path, untie_embeddings=True)
        with pytest.raises(ConfigError, match="has no tensor"):
            specs[1].build()
