"""Whether a model's decoder layers are one chain: nothing goes from one to another but the hidden state.

::

    ids a, streams 1      ids b, streams 1      ids b, streams 2       every decoder layer gives a random stream of its own
          |                     |                     |
          +-- other arguments beside the stream: they depend on the token ids, or on the embedding
                                +-- other arguments: they depend on what earlier layers gave
          +-- other logits: the head takes more than the last stream
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ds_decoupled.models.hugging_face.stubs import LayerRecorder, PartRecorder, set_module

LENGTH = 6


class NotAChain(Exception):
    """Names the part that does not fit, and why."""

    def __init__(self, part: str, why: str) -> None:
        super().__init__(f"{part}: {why}")
        self.part, self.why = part, why


def check_chain(model: Any, layers: str, outside: list[str], tuples: int) -> None:
    """Run the model on stubs, with other token ids and other streams.

    Args:
        model: without weights; it is not changed.
        layers: path of the list of decoder layers.
        outside: paths of the other parts with weights.
        tuples: how a decoder layer gives its hidden state, as in :func:`.stubs.answer`.

    Raises:
        NotAChain: for what no pipeline of these layers could give them.
    """
    _check_shared(model, layers)
    _check_dropped(model, layers, outside, tuples)
    count = len(list(model.get_submodule(layers).children()))
    generator = torch.Generator().manual_seed(0)
    # No token that a model might take for padding.
    special = {getattr(model.config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    tokens = [i for i in range(model.config.get_text_config().vocab_size) if i not in special] or [0]
    # Both of one length, so that position tells nothing; the smallest vocabularies have not enough for two long ones.
    length = max(1, min(LENGTH, len(tokens) // 2))
    ids = [torch.tensor([(tokens[start::2] or tokens)[:length]]) for start in (0, 1)]
    streams = [[torch.randn(1, length, width_of(model), generator=generator) for _ in range(count)] for _ in range(2)]
    first, other_ids, other_streams = (
        _Trial(model, layers, outside, tuples, ids[i], streams[s]) for i, s in ((0, 0), (1, 0), (1, 1)))
    if (entering := first.heard[0][0].shape) != streams[0][0].shape:
        raise NotAChain(f"{layers}.0", f"of {length} tokens it is given {tuple(entering)}, not one stream (N, T, width)")
    for index in range(1, count):
        if not torch.equal(first.heard[index][0], streams[0][index - 1]):
            raise NotAChain(f"{layers}.{index}", "it is given something else than the layer below it gives")
    for trial, what in ((other_ids, "the token ids or their embedding"), (other_streams, "what earlier layers give")):
        for index, ((_, *ours), (_, *others)) in enumerate(zip(first.heard, trial.heard)):
            for (name, a), (_, b) in zip(_tensors(ours, ""), _tensors(others, "")):
                if a.shape != b.shape or not torch.equal(a, b):
                    raise NotAChain(f"{layers}.{index}", f"beside the hidden state it is given {name or 'a tensor'}, which "
                                    f"depends on {what}")
    if first.result is not None and other_ids.result is not None and not torch.equal(first.result, other_ids.result):
        raise NotAChain("head", "it takes more than what the last decoder layer gives: the token ids or their embedding too")


class _Trial:
    """One run on stubs: what every decoder layer was given, and the result."""

    def __init__(self, model: Any, layers: str, outside: list[str], tuples: int, ids: Tensor,
                 streams: list[Tensor]) -> None:
        run, calls = stubbed(model, layers, outside, tuples, streams)
        with torch.no_grad():
            result = run(input_ids=ids, use_cache=False)
        self.heard = [layer.__dict__["heard"] for layer in run.get_submodule(layers).children()]
        self.result = getattr(result, "logits", None)


def width_of(model: Any) -> int:
    """Features of a hidden state."""
    # Of several networks of different widths (BLT) none is the model's.
    width: int = getattr(model.config.get_text_config(), "hidden_size", 0) or model.get_input_embeddings().weight.shape[-1]
    return width


def stubbed(model: Any, layers: str, outside: list[str], tuples: int,
            streams: list[Tensor] | None = None) -> tuple[Any, list[str]]:
    """A copy of the model on recorders alone, and the list of calls that they write."""
    calls: list[str] = []
    blocks = model.get_submodule(layers)
    stubs = nn.ModuleList(LayerRecorder(block, layers, calls, tuples, streams[i] if streams else None)
                          for i, block in enumerate(blocks.children()))
    run = copy.deepcopy(model, {id(blocks): stubs})
    for path in outside:
        set_module(run, path, PartRecorder(model.get_submodule(path), path, calls, width_of(model)))
    return run, calls


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors in the arguments, with names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, name or str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, name)


def _check_shared(model: Any, layers: str) -> None:
    """One tensor in two decoder layers would have to be one in two stages."""
    owners: dict[int, str] = {}
    for index, block in enumerate(model.get_submodule(layers).children()):
        for name, parameter in block.named_parameters():
            owner = owners.setdefault(id(parameter), f"{layers}.{index}")
            if owner != f"{layers}.{index}":
                raise NotAChain(f"{layers}.{index}", f"its {name} is that of {owner}: layers share weights")
    inside = f"{layers}."
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if target.startswith(inside) or source.startswith(inside):
            pair = [name[len(inside):].partition(".")[0] if name.startswith(inside) else "" for name in (target, source)]
            if pair[0] != pair[1]:
                raise NotAChain(target, f"it is {source}: layers share weights")


class _SmallestDraws(TorchFunctionMode):
    """Within, what is drawn from [0, 1) is 0: whatever happens with some probability happens."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return torch.zeros_like(result) if func in (torch.rand, torch.rand_like) else result


def _check_dropped(model: Any, layers: str, outside: list[str], tuples: int) -> None:
    """Layerdrop: while it trains, the model leaves layers out, which are found here by being called."""
    run, calls = stubbed(model, layers, outside, tuples)
    run.train()
    with torch.no_grad(), _SmallestDraws():
        run(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    count = len(list(model.get_submodule(layers).children()))
    if calls.count(layers) != count:
        config = model.config.to_dict()
        named = [f"{name} = {config[name]}" for name in config if "layerdrop" in name and config[name]]
        raise NotAChain(layers, "while it trains, the model leaves out layers at random"
                        + (f" ({', '.join(named)}; 0 in its config.json leaves out none)" if named else ""))
