"""What stands where parts of a model were, while it is looked at: it tells when it is called, and with what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = "hidden_states"
"""What transformers calls a decoder layer's first argument, where it gives it by name."""


class Stub(nn.Module):
    """Stands where a part was; attributes of the part itself can still be read."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "original" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        value = getattr(self.__dict__["original"], name)
        # Some models move what they give a part to where its weights are: there, nothing has values.
        return torch.zeros((), dtype=value.dtype).expand(value.shape) if isinstance(value, Tensor) and value.is_meta else value


def hidden_and_rest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A decoder layer's arguments: the hidden state, and what it is given beside it."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs[HIDDEN], (), {name: value for name, value in kwargs.items() if name != HIDDEN}


def answer(hidden: Tensor, tuples: int) -> Any:
    """``hidden`` as a decoder layer gives it: by itself, or at the head of a tuple of so many."""
    return (hidden, *[None] * (tuples - 1)) if tuples else hidden


def stream_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Of what a part is given, the stream: the tensor of most dimensions, of numbers rather than ids."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if not tensors:
        raise ValueError("a part outside its decoder layers is called with no tensor")
    return max(tensors, key=lambda tensor: (tensor.is_floating_point(), tensor.ndim))


class PartRecorder(Stub):
    """In place of a part outside the decoder layers: tells that it is called, and gives what depends on what it is given, in
    the shape that the part would give: of token ids, a stream of ``width``."""

    def __init__(self, original: nn.Module, path: str, calls: list[str], width: int) -> None:
        super().__init__(original)
        self.__dict__.update(path=path, calls=calls, width=width)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["calls"].append(self.__dict__["path"])
        x = stream_of(args, kwargs)
        original = self.__dict__["original"]
        embedding = isinstance(original, nn.Embedding)
        if embedding or not x.is_floating_point():
            width = original.embedding_dim if embedding else self.__dict__["width"]
            return torch.sin(x[..., None] * torch.arange(1.0, width + 1))
        if isinstance(original, nn.Linear):
            return x.float().mean(-1, keepdim=True) * torch.linspace(1, 2, original.out_features)
        return x


class LayerRecorder(Stub):
    """In place of a decoder layer: notes what it is given, and gives a stream of its own.

    Args:
        stream: ``(N, T, width)``, or None for the one that comes in.
    """

    def __init__(self, original: nn.Module, path: str, calls: list[str], tuples: int, stream: Tensor | None = None) -> None:
        super().__init__(original)
        self.__dict__.update(path=path, calls=calls, tuples=tuples, stream=stream, heard=None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["calls"].append(self.__dict__["path"])
        heard = self.__dict__["heard"] = hidden_and_rest(args, kwargs)
        stream = self.__dict__["stream"]
        return answer(heard[0] if stream is None else stream, self.__dict__["tuples"])


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` says."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
