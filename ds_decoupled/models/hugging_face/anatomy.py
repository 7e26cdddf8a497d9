"""Which parts of a causal language model come before its decoder layers, and which after.

Nothing is known of any family. A copy of the model without weights is run once with every part outside its decoder layers
replaced by a stub that tells when it is called: what is called before the first decoder layer belongs to the embedding,
what is called after the last one to the head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ds_decoupled.errors import ConfigError
from ds_decoupled.models.hugging_face.chain import NotAChain, check_chain, stubbed, width_of

_TUPLES = 5
"""One more than the longest tuple that a decoder layer is tried with."""


@dataclass(frozen=True)
class Anatomy:
    """Where a model's parts are, as module paths.

    Attributes:
        layers: the list of decoder layers.
        count: how many there are.
        before, after: parts with weights that are called before the first layer and after the last one.
        width: features of a hidden state.
        input_weight, output_weight: parameter names of the token embedding and of the unembedding.
        tied: whether both are one tensor in the original.
        tuples: 0 where a decoder layer gives its hidden state by itself, or the length of the tuple that it begins.
    """

    layers: str
    count: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    width: int
    input_weight: str
    output_weight: str
    tied: bool
    tuples: int


@lru_cache(maxsize=4)
def _skeleton(model_class: Any, config_json: str, holder: _ConfigHolder) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(copy.deepcopy(holder.config), dtype=torch.float32)
    return model.eval()


class _ConfigHolder:
    """Carries a configuration into a cached call; all holders are equal, the JSON beside them is the key."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ConfigHolder)


def skeleton(model_class: Any, config: Any) -> Any:
    """The model without weights (parameters on the meta device, buffers real), in float32; not to be changed."""
    key = f"{config._attn_implementation}{config.to_json_string(use_diff=False)}"
    return _skeleton(model_class, key, _ConfigHolder(config))


def _unfit(model: nn.Module, part: str, why: str) -> ConfigError:
    return ConfigError("model", type(model).__name__, f"{part}: {why}",
                       "It cannot be cut into stages; write its layers as a PipelineModule by hand.")


def dissect(model_class: Any, config: Any) -> Anatomy:
    """Find the parts.

    Raises:
        ConfigError: naming the part that does not fit.
    """
    model = skeleton(model_class, config)
    # The class may have changed its copy: of an encoder and a decoder it takes the decoder alone.
    if getattr(model.config, "is_encoder_decoder", False):
        raise _unfit(model, "encoder", "a model with an encoder and a decoder is no chain of layers")
    names = {id(part): path for path, part in model.named_modules()}
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    for part, what in ((embedding, "token embedding"), (unembedding, "unembedding")):
        if part is None or id(part) not in names:
            raise _unfit(model, what, "the model does not tell where it is")
    layers, (before, after), tuples = _find_layers(model)
    try:
        check_chain(model, layers, outside(model, layers), tuples)
    except NotAChain as error:
        raise _unfit(model, error.part, error.why) from error
    # What the model ties, which is not always what its configuration says.
    pairs = model.all_tied_weights_keys
    entrance, exit_ = (f"{names[id(part)]}.weight" for part in (embedding, unembedding))
    tied = pairs.get(entrance, entrance) == pairs.get(exit_, exit_)
    found = Anatomy(layers, len(list(model.get_submodule(layers).children())), before, after, width_of(model), entrance,
                    exit_, tied, tuples)
    _all_covered(model, found)
    return found


def _find_layers(model: Any) -> tuple[str, tuple[tuple[str, ...], tuple[str, ...]], int]:
    """Path of the list of decoder layers, the parts before and after it, and how a layer gives its hidden state.

    It is the outermost list of ``num_hidden_layers``; where the configuration counts something else, such as the layers of an
    encoder that this class has not, the outermost list that is called like one.
    """
    lists = [(path, len(part)) for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists.sort(key=lambda found: (found[1] != count, found[0].count(".")))
    if not lists:
        raise _unfit(model, "decoder layers", "there is no list of layers")
    outermost = [path for path, _ in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    first: NotAChain | None = None
    for layers in outermost:
        farthest, error = -1, None
        for tuples in range(_TUPLES):
            try:
                return layers, _before_and_after(model, layers, tuples), tuples
            except _Stopped as stopped:
                if stopped.calls > farthest:
                    farthest, error = stopped.calls, stopped
        first = first or error
    assert first is not None
    raise _unfit(model, first.part, first.why) from first


class _Stopped(NotAChain):
    """So far a run on stubs came."""

    def __init__(self, part: str, why: str, calls: int) -> None:
        super().__init__(part, why)
        self.calls = calls


def _before_and_after(model: nn.Module, layers: str, tuples: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    run, calls = stubbed(model, layers, outside(model, layers), tuples)
    count = len(list(run.get_submodule(layers).children()))
    try:
        with torch.no_grad():
            run(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except Exception as error:
        done = f"after {calls[-1]}" if calls else "before its first part"
        reason = (str(error).splitlines() or [""])[0]
        raise _Stopped(done, f"its forward pass does not run on parts alone ({type(error).__name__}: {reason})",
                       len(calls)) from error
    if layers not in calls:
        raise _Stopped(layers, "its forward pass does not call the layers", 0)
    first, last = calls.index(layers), len(calls) - 1 - calls[::-1].index(layers)
    if calls[first:last + 1] != [layers] * count:
        between = next((call for call in calls[first:last + 1] if call != layers), layers)
        raise _Stopped(between, "the decoder layers are not one chain: it is called among them, or a layer more than once",
                       len(calls))
    before, after = tuple(dict.fromkeys(calls[:first])), tuple(dict.fromkeys(calls[last + 1:]))
    both = set(before) & set(after)
    if both:
        raise _Stopped(min(both), "it is called both before and after the decoder layers", len(calls))
    return before, after


def outside(model: nn.Module, layers: str) -> list[str]:
    """Parts with weights that are not decoder layers: children of the modules on the way to them."""
    found = []
    way = layers.split(".")
    for depth in range(len(way)):
        level = ".".join(way[:depth])
        for name, child in model.get_submodule(level).named_children():
            if name != way[depth] and any(True for _ in child.parameters()):
                found.append(f"{level}.{name}" if level else name)
    return found


def _all_covered(model: nn.Module, anatomy: Anatomy) -> None:
    prefixes = tuple(f"{path}." for path in (anatomy.layers, *anatomy.before, *anatomy.after))
    left = [name for name, _ in model.named_parameters() if not name.startswith(prefixes)]
    if left:
        raise _unfit(model, left[0], "these weights belong to no part that a plain forward pass on token ids calls")
