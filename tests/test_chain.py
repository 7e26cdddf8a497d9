"""What is no chain of layers is refused by the name of the reason, in a model made for each and in real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.pipe import TiedLayerSpec
from test_hugging_face import IDS, build, run, small_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ds_decoupled.errors import ConfigError
from ds_decoupled.models import from_hugging_face


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, beside: Tensor | None = None) -> Tensor:
        return hidden_states + self.linear(hidden_states if beside is None else beside)


class Odd(PreTrainedModel):
    """A chain of layers, but for what a subclass does."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.build()
        self.post_init()

    def build(self) -> None: ...

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def call(self, index: int, hidden: Tensor, seen: list[Tensor]) -> Tensor:
        """Layer ``index``; ``seen``: the embedding and what the layers gave."""
        return self.layers[index](hidden)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any) -> CausalLMOutput:
        hidden = inputs_embeds if input_ids is None else self.embed(input_ids)
        seen = [hidden]
        for index in range(len(self.layers)):
            hidden = self.call(index, hidden, seen)
            seen.append(hidden)
        return CausalLMOutput(logits=self.lm_head(self.last(hidden, seen)))

    def last(self, hidden: Tensor, seen: list[Tensor]) -> Tensor:
        return hidden


class ReadsTheEmbedding(Odd):
    def call(self, index: int, hidden: Tensor, seen: list[Tensor]) -> Tensor:
        return self.layers[index](hidden, seen[0])


class ReadsAnEarlierLayer(Odd):
    def call(self, index: int, hidden: Tensor, seen: list[Tensor]) -> Tensor:
        return self.layers[index](hidden, seen[1] if index == 2 else None)


class ScalesBetween(Odd):
    def call(self, index: int, hidden: Tensor, seen: list[Tensor]) -> Tensor:
        return self.layers[index](hidden if index == 0 else 2 * hidden)


class ReadsAllAtTheEnd(Odd):
    def last(self, hidden: Tensor, seen: list[Tensor]) -> Tensor:
        return hidden + seen[0]


class Shares(Odd):
    def build(self) -> None:
        self.layers[2].linear = self.layers[0].linear


class Drops(Odd):
    def call(self, index: int, hidden: Tensor, seen: list[Tensor]) -> Tensor:
        if self.training and torch.rand([]) < 1e-6:
            return hidden
        return self.layers[index](hidden)


def test_a_chain() -> None:
    model = Odd(small_config("llama")).eval()
    torch.testing.assert_close(run(build(from_hugging_face(model)), IDS), model(input_ids=IDS).logits)


@pytest.mark.parametrize("vocabulary", [2, 13, 23])
def test_small_vocabularies(vocabulary: int) -> None:
    """The stand-ins' two texts are as long as each other, however few tokens there are."""
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                                  num_attention_heads=1, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, vocabulary, (1, 5))
    torch.testing.assert_close(run(build(from_hugging_face(model)), ids), model(input_ids=ids).logits)


@pytest.mark.parametrize("kind, words", [
    (ReadsTheEmbedding, "layers.0: .*depends on the token ids or their embedding"),
    (ReadsAnEarlierLayer, "layers.2: .*depends on what earlier layers give"),
    (ScalesBetween, "layers.1: it is given something else than the layer below it gives"),
    (ReadsAllAtTheEnd, "head: it takes more than what the last decoder layer gives"),
    (Shares, r"layers.2: its linear.weight is that of layers.0"),
    (Drops, "layers: while it trains, the model leaves out layers at random"),
])
def test_no_chain(kind: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_hugging_face(kind(small_config("llama")))


def test_zamba() -> None:
    """It gives the embedding to later layers, and shares a block between them."""
    config = AutoConfig.for_model("zamba", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
                                  num_attention_heads=4, num_key_value_heads=4, attn_layer_period=2, attn_layer_offset=1,
                                  mamba_d_state=8, mamba_dt_rank=4)
    with pytest.raises(ConfigError, match="layers share weights|original_hidden_states, which depends on the token ids"):
        from_hugging_face(AutoModelForCausalLM.from_config(config))


def test_layerdrop() -> None:
    """OPT leaves out layers with this probability while it trains; by that, ours would find none."""
    config = small_config("opt")
    config.layerdrop = 0.1
    with pytest.raises(ConfigError, match=r"leaves out layers at random \(layerdrop = 0.1; 0 in its config.json"):
        from_hugging_face(config)


def test_a_configuration_that_ties_what_the_model_does_not() -> None:
    """Odd has no way to tie: two tensors, whatever its configuration says."""
    config = small_config("llama")
    config.tie_word_embeddings = True
    model = Odd(config).eval()
    specs = from_hugging_face(model)
    assert not any(isinstance(spec, TiedLayerSpec) for spec in specs)
    torch.testing.assert_close(run(build(specs), IDS), model(input_ids=IDS).logits)
