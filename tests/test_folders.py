"""Folders of weights whose names are not those in memory, and folders that say something else than their configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hugging_face import IDS, SIZES, build, run, small_config, small_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ds_decoupled.errors import ConfigError
from ds_decoupled.models import from_hugging_face

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}


def named_otherwise(family: str) -> Any:
    """A model whose file has other names or layouts than it has itself."""
    torch.manual_seed(1)
    own = {"bert": {"is_decoder": True, "hidden_act": "gelu"}, "gpt_neox": {}}.get(family, EXPERTS)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **own, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "qwen3_moe", "granitemoe", "bert"])
def test_names_on_disk(family: str, tmp_path: Path) -> None:
    """GPT-NeoX's unembedding is called embed_out there, and experts stand one by one that are held fused."""
    model = named_otherwise(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    names = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert family == "bert" or names - set(model.state_dict()), "this family shows nothing"
    layers = build(from_hugging_face(tmp_path, untie_embeddings=True))
    torch.testing.assert_close(run(layers, IDS), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_names_in_memory_on_disk(tmp_path: Path) -> None:
    """A file that was saved with them loads, too."""
    model = named_otherwise("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert set(stored(tmp_path)) == set(model.state_dict())
    torch.testing.assert_close(run(build(from_hugging_face(tmp_path)), IDS), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_layer_reads_its_own_experts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_decoupled.models.hugging_face import names

    named_otherwise("mixtral").save_pretrained(tmp_path)
    specs = from_hugging_face(tmp_path)
    read: list[str] = []
    convert = names.Group.convert
    monkeypatch.setattr(names.Group, "convert", lambda self, *rest: read.extend(name for name, _ in self.stored)
                        or convert(self, *rest))
    specs[2].build()
    assert len(read) > 12 and all(name.startswith("model.layers.1.") for name in read)


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**said, **changes}))

    return change


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        tensors = stored(folder)
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return save


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:len(content) // 2])


def shards(folder: Path) -> None:
    small_model("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()


def without_a_shard(folder: Path) -> None:
    shards(folder)
    next(iter(sorted(folder.glob("*00002-of*")))).unlink()


def with_an_empty_shard(folder: Path) -> None:
    shards(folder)
    save_file({"nothing": torch.zeros(1)}, next(iter(sorted(folder.glob("*00002-of*")))))


PROJECTION = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("change, words", [
    (change_config(quantization_config={"quant_method": "gptq", "bits": 4}), r"its weights are quantized \(gptq\)"),
    (change_tensors(lambda t: t.update({f"{PROJECTION}.weight": t[f"{PROJECTION}.weight"].to(torch.int8)})),
     "q_proj.weight is of type I8: codes"),
    (change_tensors(lambda t: t.update({f"{PROJECTION}.weight": t[f"{PROJECTION}.weight"].to(torch.float8_e4m3fn)})),
     "q_proj.weight is of type F8_E4M3: codes"),
    (change_tensors(lambda t: t.update({f"{PROJECTION}.weight_scale": torch.ones(1)})), "q_proj.weight_scale beside .*q_proj"),
    (change_tensors(lambda t: t.update({f"{PROJECTION}.bias": torch.ones(32)})), "q_proj.bias beside .*q_proj.weight"),
    (change_config(vocab_size=59), r"weight is of shape \(61, 32\), and by its configuration of \(59, 32\)"),
    (change_config(num_hidden_layers=2), r"it has model.layers.2.\S+, and by its configuration 2 layers"),
    (cut, "model.safetensors.*cannot be read"),
    (without_a_shard, "00002-of-.*cannot be read"),
    (with_an_empty_shard, "00002-of-.*it lacks model"),
    (change_config(model_type="llama2000", auto_map={"AutoConfig": "code.Config"}), "its configuration cannot be read"),
], ids=["quantized", "int8", "fp8", "scales", "bias", "vocabulary", "layers", "cut", "no shard", "empty shard", "code"])
def test_what_a_folder_says(change: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    """Refused before any layer is built, so that every rank says it at once."""
    small_model("llama").save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(ConfigError, match=words) as error:
        from_hugging_face(tmp_path)
    assert "\n" not in str(error.value)


def test_a_quantized_model() -> None:
    model = small_model("llama")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ConfigError, match="quantized"):
        from_hugging_face(model)


def test_left_overs_are_no_harm(tmp_path: Path) -> None:
    """Masks and frequencies that older versions of transformers saved."""
    model = small_model("gpt2")
    model.save_pretrained(tmp_path)
    change_tensors(lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}))(tmp_path)
    layers = build(from_hugging_face(tmp_path, untie_embeddings=True))
    torch.testing.assert_close(run(layers, IDS), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    """Its folder is refused; the decoder by itself is a chain, whatever the depth of an encoder."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
                        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "both")
    with pytest.raises(ConfigError, match="it holds an encoder and a decoder"):
        from_hugging_face(tmp_path / "both")
    decoder = AutoModelForCausalLM.from_config(config).eval()
    decoder.save_pretrained(tmp_path / "decoder")
    for source in (decoder, tmp_path / "decoder"):
        layers = build(from_hugging_face(source, untie_embeddings=True))
        assert len(layers) == 5
        torch.testing.assert_close(run(layers, IDS), decoder(input_ids=IDS, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_a_folder_of_another_architecture(tmp_path: Path) -> None:
    small_model("llama").save_pretrained(tmp_path)
    small_config("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no tensor"):
        from_hugging_face(tmp_path, untie_embeddings=True)[1].build()
