"""One family of language models after the other: a tiny model, cut into layers, against the model as it is."""

from __future__ import annotations

import contextlib
import copy
import signal
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ds_decoupled.errors import ConfigError

COLUMNS = ("logits", "gradients", "mask", "folder", "round trip", "generation")
TOLERANCE = 1e-4
"""Of the largest number: float32, sums in another order."""
VOCABULARY, LENGTH = 67, 12
MOST_WEIGHTS = 100_000_000

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "emb_dim": 32, "embed_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "n_inner": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "ffn_hidden_size": 48, "mlp_hidden_size": 48,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4, "encoder_layers": 2,
    "num_decoder_layers": 4, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_positions": 64,
    "n_ctx": 64, "max_seq_len": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "sliding_window": 6,
    "word_embed_proj_dim": 32, "rotary_dim": 4, "state_size": 8, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8,
    "mamba_d_conv": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "time_step_rank": 4, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "index_head_dim": 8, "index_n_heads": 4, "index_topk": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "dropout": 0.0,
    "attention_dropout": 0.0, "layerdrop": 0.0, "decoder_layerdrop": 0.0, "lru_width": 32, "attention_hidden_size": 32,
    "type_vocab_size": 2, "moe_layer_start_index": 1, "first_k_dense_replace": 1, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "dff": 48,
}
"""Sizes by the names that configurations have for them; each gets those that it has."""

UNSAID = {"head_dim", "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id"}
"""Of these, those that are set where the configuration itself says nothing."""

OWN: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "num_hidden_layers": 2, "axial_pos_embds": False,
                 "attention_head_size": 8, "local_attn_chunk_length": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "num_key_value_heads": 4,
              "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4, "num_key_value_heads": 4,
               "attention_head_dim": 16, "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single families need beside that."""


class Late(Exception):
    """A family took too long."""


@dataclass
class Outcome:
    """What came of one family.

    Attributes:
        found: by column, "yes" or what is wrong.
        refused: the reason that the conversion gives for not taking it.
    """

    name: str
    found: dict[str, str] = field(default_factory=dict)
    refused: str = ""

    @property
    def good(self) -> bool:
        """All columns."""
        return [self.found.get(column) for column in COLUMNS] == ["yes"] * len(COLUMNS)

    def row(self) -> str:
        """Of the table."""
        return "| " + " | ".join((f"`{self.name}`", *(self.found.get(column, "–") for column in COLUMNS))) + " |"

    def line(self) -> str:
        """In plain text."""
        if self.refused:
            return f"{self.name}: refused: {self.refused}"
        return self.row() if self.found.get("model") == "yes" else f"{self.name}: no tiny model: {self.found}"


def names() -> list[str]:
    """Every model type that ``AutoModelForCausalLM`` knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(name: str) -> Any:
    """A configuration of the family with about ten thousand parameters."""
    from transformers import AutoConfig

    kind = type(AutoConfig.for_model(name))
    return kind(**{**_sizes(kind), **OWN.get(name, {})})


def _sizes(kind: Any) -> dict[str, Any]:
    """Of ``SMALL`` what a configuration class knows, by its own names, and the same for those inside it."""
    default = kind().to_dict()
    sizes = {name: SMALL[common] for name, common in ((n, kind.attribute_map.get(n, n)) for n in default)
             if common in SMALL and (default[name] is not None or common in UNSAID)}
    sizes |= {own: SMALL[common] for common, own in kind.attribute_map.items() if own in default and common in SMALL
              and not isinstance(default[own], list)}
    if "kv_lora_rank" in default and "num_key_value_heads" in sizes:  # latent attention has no groups
        sizes["num_key_value_heads"] = SMALL["num_attention_heads"]
    for name, inner in getattr(kind, "sub_configs", {}).items():
        if inner.__name__ == "AutoConfig":  # of any kind: the one that it is by default
            inner = type(getattr(kind(), name, None))
        if hasattr(inner, "model_type"):
            sizes[name] = {"model_type": inner.model_type, **_sizes(inner)}
    return sizes


def tiny_model(name: str) -> Any:
    """A model of the family in float32, in which no weight is what it begins with: ones and zeros would hide mistakes."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(name)
    with torch.device("meta"):  # a size that goes by a name of its own would make a model of its usual billions
        weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"it has {weights:,} weights; say in OWN what makes it small")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def try_family(name: str, seconds: int) -> Outcome:
    """All that the table shows of one family."""
    outcome = Outcome(name)
    with warnings.catch_warnings(), _within(seconds):
        warnings.simplefilter("ignore")
        try:
            _try(name, outcome)
        except Exception as error:  # of one family; the others go on
            outcome.found.setdefault(next(c for c in ("model", *COLUMNS, "end") if c not in outcome.found), _said(error))
    return outcome


def _try(name: str, outcome: Outcome) -> None:
    from ds_decoupled.models import from_hugging_face

    model = tiny_model(name)
    outcome.found["model"] = "yes"
    try:
        layers = build(from_hugging_face(model, untie_embeddings=True))
    except ConfigError as error:
        outcome.refused = error.fields[2]
        return
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    wanted = model(input_ids=ids, use_cache=False).logits
    outcome.found["logits"] = _alike(run(layers, ids), wanted)
    _column(outcome, "gradients", lambda: _gradients(model, layers, ids))

    def masked() -> str:
        known = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return _alike(run(layers, (ids, mask))[mask.bool()], known[mask.bool()])

    _column(outcome, "mask", masked)
    with tempfile.TemporaryDirectory() as place:
        saved, ours = Path(place, "saved"), Path(place, "ours")

        def folder() -> str:
            model.save_pretrained(saved)
            return _alike(run(build(from_hugging_face(saved, untie_embeddings=True)), ids), wanted)

        _column(outcome, "folder", folder)

        anatomy: Any = layers[0].conversion.anatomy  # type: ignore[union-attr]

        def round_trip() -> str:
            export(layers, ours)
            names, known = (_names(folder) for folder in (ours, saved))
            if known - names or (names - known and not anatomy.tied):  # here a tied pair is two tensors
                return f"names: {sorted(names ^ known)[:2]}"
            again = load(ours)
            return _alike(again(input_ids=ids, use_cache=False).logits, wanted)

        _column(outcome, "round trip", round_trip)

        def generation() -> str:
            told, said = (_continued(one, ids[:1]) for one in (model, load(ours)))
            return "yes" if torch.equal(said, told) else f"{said[0, -4:].tolist()}, not {told[0, -4:].tolist()}"

        _column(outcome, "generation", generation)


def build(specs: list[Any]) -> list[nn.Module]:
    """The layers, for evaluation."""
    return [spec.build().eval() for spec in specs]


def run(layers: list[nn.Module], inputs: Any) -> Tensor:
    """One layer after the other."""
    for layer in layers:
        inputs = layer(inputs)
    assert isinstance(inputs, Tensor)
    return inputs


def export(layers: list[nn.Module], folder: Path) -> None:
    """Written as from an engine on one rank."""
    from ds_decoupled.models import to_hugging_face

    grid = types.SimpleNamespace(get_pipe_parallel_rank=lambda: 0, get_pipe_parallel_world_size=lambda: 1,
                                 get_data_parallel_rank=lambda: 0)
    to_hugging_face(types.SimpleNamespace(module=nn.Sequential(*layers), grid=grid, is_first_stage=lambda: True,
                                          is_last_stage=lambda: True), folder)


def load(folder: Path) -> Any:
    """What ``transformers`` makes of the folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _continued(model: Any, ids: Tensor) -> Tensor:
    """``ids`` with four tokens behind them, by the model's own ``generate``."""
    model.generation_config.forced_eos_token_id = None
    told: Tensor = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
                                  attention_mask=torch.ones_like(ids), use_cache=False)
    return told


def _gradients(model: Any, layers: list[nn.Module], ids: Tensor) -> str:
    """Of a random sum of the logits; a tied pair's is the sum over both tensors."""
    wanted = model(input_ids=ids, use_cache=False).logits
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (wanted * weight).sum().backward()
    (run(layers, ids) * weight).sum().backward()
    found = {name: p.grad for layer in layers for name, p in layer.root.named_parameters()}  # type: ignore[union-attr]
    anatomy: Any = layers[0].conversion.anatomy  # type: ignore[union-attr]
    if anatomy.tied:
        pair = [found.pop(name) for name in (anatomy.output_weight, anatomy.input_weight)]
        found[anatomy.input_weight] = torch.stack([grad for grad in pair if grad is not None]).sum(0)
    for name, parameter in model.named_parameters():
        if name == anatomy.output_weight and anatomy.tied:
            continue
        ours = found.get(name)
        if (ours is None) != (parameter.grad is None):
            return f"{name}: none" if ours is None else f"{name}: one too many"
        if ours is not None and (told := _alike(ours, parameter.grad)) != "yes":
            return f"{name}: {told}"
    return "yes"


def _names(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def _alike(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"{tuple(found.shape)}, not {tuple(wanted.shape)}"
    off = ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)).item()
    return "yes" if off < TOLERANCE else f"off by {off:.2g}"


def _column(outcome: Outcome, column: str, trial: Callable[[], str]) -> None:
    try:
        outcome.found[column] = trial()
    except Late:
        raise
    except Exception as error:
        outcome.found[column] = _said(error)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:160]}"


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Late(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor: others may be busy with it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
