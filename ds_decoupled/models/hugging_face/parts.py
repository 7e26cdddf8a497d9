"""The three kinds of layers that a causal language model is cut into: embedding, decoder layer, head.

Each holds its own weights under their names in the original, and runs the original's code. Between them travels the hidden
state ``(N, T, width)``; an attention mask ``(N, T)`` and position ids ``(N, T)``, where they are given with the token ids,
travel beside it. What a decoder layer takes besides (causal masks, rotary tables) is rebuilt on every rank by the
original's own code and kept for as long as shapes stay the same.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ds_decoupled.models.hugging_face.anatomy import Anatomy, outside, skeleton
from ds_decoupled.models.hugging_face.conversion import Conversion
from ds_decoupled.models.hugging_face.stubs import Stub, answer, hidden_and_rest, set_module, stream_of

Hidden = Tensor | tuple[Tensor, ...]
_SIDE_INPUTS = ("attention_mask", "position_ids")
_SHAPES_KEPT = 8


class _Reached(Exception):
    """The forward pass has come as far as it is needed."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Exit(Stub):
    """In place of the first decoder layer: the forward pass ends here."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(hidden_and_rest(args, kwargs)[0])


class _Through(Stub):
    """In place of a part whose result is not needed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = stream_of(args, kwargs)
        # Positions are added to what the caller gives: a zero of any shape leaves it as it is.
        return torch.zeros((), device=x.device) if isinstance(self.__dict__["original"], nn.Embedding) else x


class _Entrance(Stub):
    """In place of all decoder layers: the hidden state comes in here."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["hidden"]


class _Listener(Stub):
    """In place of one decoder layer: notes what it is given beside the hidden state."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, *rest = hidden_and_rest(args, kwargs)
        self.__dict__["heard"] = rest
        return answer(hidden, self.__dict__["tuples"])


def _shell(model_class: Any, config: Any, anatomy: Anatomy, keep: tuple[str, ...], layers: list[type[Stub]]) -> Any:
    """The model with only the parts ``keep``, and stubs in place of its decoder layers."""
    original = skeleton(model_class, config)
    blocks = original.get_submodule(anatomy.layers)
    gone = [path for path in outside(original, anatomy.layers) if path not in keep]
    # Decoder layers are not copied: only their stand-ins are wanted.
    shell = copy.deepcopy(original, {id(blocks): nn.ModuleList(stub(b) for stub, b in zip(layers, blocks))})
    for path in gone:
        set_module(shell, path, _Through(original.get_submodule(path)))
    return shell


def _given(inputs: Hidden) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
    """Hidden state or ids, what travels beside it, and the same by name."""
    x, *beside = inputs if isinstance(inputs, tuple) else (inputs,)
    if len(beside) > len(_SIDE_INPUTS):
        raise ValueError(f"inputs are token ids, attention mask and position ids at most; these have {1 + len(beside)} parts")
    return x, tuple(beside), dict(zip(_SIDE_INPUTS, beside))


def _beside(hidden: Tensor, beside: tuple[Tensor, ...]) -> Hidden:
    return (hidden, *beside) if beside else hidden


class Part(nn.Module):
    """What all three have in common.

    Attributes:
        conversion: how the model was cut.
    """

    conversion: Conversion

    def __init__(self, conversion: Conversion) -> None:
        super().__init__()
        self.conversion = conversion

    @property
    def root(self) -> nn.Module:
        """A tree of modules in which every weight has its original name; its own name tells DeepSpeed's Muon what it is."""
        raise NotImplementedError


class EmbeddingPart(Part):
    """Token ids ``(N, T)``, or a tuple of them, an attention mask and position ids, to the first hidden state."""

    def __init__(self, conversion: Conversion) -> None:
        super().__init__(conversion)
        self.embedding = _shell(*conversion.model, conversion.anatomy.before, [_Exit])
        conversion.fill(self.embedding)

    @property
    def root(self) -> nn.Module:
        return self.embedding

    def forward(self, inputs: Hidden) -> Hidden:
        ids, beside, named = _given(inputs)
        try:
            self.embedding(input_ids=ids, use_cache=False, **named)
        except _Reached as reached:
            return _beside(reached.hidden, beside)
        raise RuntimeError("the forward pass never came to a decoder layer")


class _Surroundings:
    """What decoder layers are given beside the hidden state; shared by the layers of a process.

    It holds no weights and is no ``nn.Module``, so that casting a model to bf16 leaves the rotary frequencies in float32, as
    in the original.
    """

    def __init__(self, model_class: Any, config: Any, anatomy: Anatomy) -> None:
        self.shell = _shell(model_class, config, anatomy, (), [_Listener] * anatomy.count)
        self.layers = list(self.shell.get_submodule(anatomy.layers).children())
        for layer in self.layers:
            layer.__dict__["tuples"] = anatomy.tuples
        self.width = anatomy.width
        self.device = torch.device("cpu")
        self.by_shape: OrderedDict[Any, list[Any]] = OrderedDict()

    def of(self, index: int, hidden: Tensor, named: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of decoder layer ``index``."""
        if named:
            return self._ask(hidden, named)[index]
        key = (hidden.shape, hidden.dtype, hidden.device)
        if key not in self.by_shape:
            self.by_shape[key] = self._ask(hidden, named)
            if len(self.by_shape) > _SHAPES_KEPT:
                self.by_shape.popitem(last=False)
        self.by_shape.move_to_end(key)
        return self.by_shape[key][index]

    @torch.no_grad()
    def _ask(self, hidden: Tensor, named: dict[str, Tensor]) -> list[Any]:
        if self.device != hidden.device:
            self.shell.to(hidden.device)
            self.device = hidden.device
        for layer in self.layers:  # a model without any weights has no type, by which OpenAI's GPT makes its mask
            layer.weight = nn.Parameter(hidden.new_empty(0), requires_grad=False)
        nothing = torch.zeros_like(hidden)  # some models write into it
        self.shell(inputs_embeds=nothing, use_cache=False, **named)
        return [layer.__dict__.pop("heard") for layer in self.layers]


@lru_cache(maxsize=4)
def _surroundings(conversion: Conversion) -> _Surroundings:
    return _Surroundings(*conversion.model)


@torch.compiler.disable  # the making of them too: Dynamo looks through the cache, and would make them again in every layer
def _beside_the_stream(conversion: Conversion, index: int, hidden: Tensor, named: dict[str, Tensor]) -> Any:
    """What decoder layer ``index`` is given beside the hidden state: positional arguments, and those by name."""
    return _surroundings(conversion).of(index, hidden, named)


class DecoderPart(Part):
    """One decoder layer: hidden state to hidden state, what travels beside it passes through."""

    def __init__(self, conversion: Conversion, index: int) -> None:
        super().__init__(conversion)
        self.index = index
        path = f"{conversion.anatomy.layers}.{index}"
        layer = copy.deepcopy(skeleton(*conversion.model[:2]).get_submodule(path))
        self.layer = level = nn.Module()
        for name in path.split(".")[:-1]:
            level.add_module(name, nn.Module())
            level = level.get_submodule(name)
        level.add_module(str(index), layer)
        self.path = path
        conversion.fill(self.layer)

    @property
    def root(self) -> nn.Module:
        return self.layer

    def forward(self, inputs: Hidden) -> Hidden:
        hidden, beside, named = _given(inputs)
        args, kwargs = _beside_the_stream(self.conversion, self.index, hidden, named)
        outputs = self.layer.get_submodule(self.path)(hidden, *args, **kwargs)
        return _beside(outputs[0] if isinstance(outputs, tuple | list) else outputs, beside)


class HeadPart(Part):
    """The last hidden state to logits ``(N, T, vocab_size)``: final norm, unembedding, and what the original does to them."""

    def __init__(self, conversion: Conversion) -> None:
        super().__init__(conversion)
        self.unembedding = _shell(*conversion.model, conversion.anatomy.after, [_Entrance])
        conversion.fill(self.unembedding)

    @property
    def root(self) -> nn.Module:
        return self.unembedding

    def forward(self, inputs: Hidden) -> Tensor:
        hidden, _, _ = _given(inputs)
        entrance = self.unembedding.get_submodule(f"{self.conversion.anatomy.layers}.0")
        entrance.__dict__["hidden"] = answer(hidden, self.conversion.anatomy.tuples)
        nothing = torch.zeros_like(hidden)  # some models write into it
        try:
            logits: Tensor = self.unembedding(inputs_embeds=nothing, use_cache=False).logits
        finally:
            del entrance.__dict__["hidden"]
        return logits


class TiedEnds(nn.Module):
    """Embedding and head with one weight between them: used as both by ``TiedLayerSpec``."""

    def __init__(self, conversion: Conversion) -> None:
        super().__init__()
        self.embedding, self.head = EmbeddingPart(conversion), HeadPart(conversion)
        weight = self.embedding.root.get_parameter(conversion.anatomy.input_weight)
        output, _, name = conversion.anatomy.output_weight.rpartition(".")
        setattr(self.head.root.get_submodule(output), name, weight)

    def forward(self, inputs: Hidden) -> Hidden:
        hidden: Hidden = self.embedding(inputs)
        return hidden


def tied_head(ends: TiedEnds, inputs: Hidden) -> Tensor:
    """The second use of :class:`TiedEnds`."""
    logits: Tensor = ends.head(inputs)
    return logits
