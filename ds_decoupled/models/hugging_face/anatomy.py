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
from torch import Tensor, nn

from ds_decoupled.errors import ConfigError


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
        tuples: whether a decoder layer gives its hidden state in a tuple.
    """

    layers: str
    count: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    width: int
    input_weight: str
    output_weight: str
    tied: bool
    tuples: bool


class Stub(nn.Module):
    """Stands where a part was; attributes of the part itself can still be read."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "original" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self.__dict__["original"], name)


class _Recorder(Stub):
    """Tells when it is called, and answers with zeros of the shape that the part would give."""

    def __init__(self, original: nn.Module, path: str, calls: list[str], tuples: bool = False) -> None:
        super().__init__(original)
        self.__dict__.update(path=path, calls=calls, tuples=tuples)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["calls"].append(self.__dict__["path"])
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        original = self.__dict__["original"]
        if isinstance(original, nn.Embedding):
            return torch.zeros(*x.shape, original.embedding_dim)
        if isinstance(original, nn.Linear):
            return torch.zeros(*x.shape[:-1], original.out_features)
        return (x,) if self.__dict__["tuples"] else x


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


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` says."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _unfit(model: nn.Module, part: str, why: str) -> ConfigError:
    return ConfigError("model", type(model).__name__, f"{part}: {why}",
                       "It cannot be cut into stages; write its layers as a PipelineModule by hand.")


def dissect(model_class: Any, config: Any) -> Anatomy:
    """Find the parts.

    Raises:
        ConfigError: naming the part that does not fit.
    """
    model = skeleton(model_class, config)
    if getattr(config, "is_encoder_decoder", False):
        raise _unfit(model, "encoder", "a model with an encoder and a decoder is no chain of layers")
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [path for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if not lists or count is None:
        raise _unfit(model, "decoder layers", f"there is no list of num_hidden_layers = {count} layers")
    layers = min(lists, key=lambda path: path.count("."))
    try:
        (before, after), tuples = _before_and_after(model, layers, tuples=False), False
    except ConfigError as error:
        try:
            (before, after), tuples = _before_and_after(model, layers, tuples=True), True
        except ConfigError:
            raise error from None
    names = {id(part): path for path, part in model.named_modules()}
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    for part, what in ((embedding, "token embedding"), (unembedding, "unembedding")):
        if part is None or id(part) not in names:
            raise _unfit(model, what, "the model does not tell where it is")
    found = Anatomy(layers, count, before, after, config.get_text_config().hidden_size, f"{names[id(embedding)]}.weight",
                    f"{names[id(unembedding)]}.weight", bool(getattr(config.get_text_config(), "tie_word_embeddings", False)),
                    tuples)
    _all_covered(model, found)
    return found


def _before_and_after(model: nn.Module, layers: str, tuples: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    run = copy.deepcopy(model)
    calls: list[str] = []
    for path in outside(model, layers):
        set_module(run, path, _Recorder(model.get_submodule(path), path, calls))
    blocks = run.get_submodule(layers)
    assert isinstance(blocks, nn.ModuleList)
    for i in range(len(blocks)):
        blocks[i] = _Recorder(blocks[i], layers, calls, tuples)
    try:
        with torch.no_grad():
            run(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except Exception as error:
        done = f"after {calls[-1]}" if calls else "before its first part"
        raise _unfit(model, done, f"its forward pass does not run on parts alone ({type(error).__name__}: {error})") from error
    if layers not in calls:
        raise _unfit(model, layers, "its forward pass does not call the layers")
    first, last = calls.index(layers), len(calls) - 1 - calls[::-1].index(layers)
    if calls[first:last + 1] != [layers] * len(blocks):
        between = next((call for call in calls[first:last + 1] if call != layers), layers)
        raise _unfit(model, between, "the decoder layers are not one chain: it is called among them, or a layer more than once")
    before, after = tuple(dict.fromkeys(calls[:first])), tuple(dict.fromkeys(calls[last + 1:]))
    both = set(before) & set(after)
    if both:
        raise _unfit(model, min(both), "it is called both before and after the decoder layers")
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
