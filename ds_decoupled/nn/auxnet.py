"""AuxNets: small networks that make every stage's input without the stages below (arXiv 2112.05387).

One is a chain of *steps*, one for every stage but the last. A step takes what its stage takes, and gives what its stage
gives: ``lambda_{k+1} = step_k(lambda_k)``, so that ``G_k(x) = step_{k-1}(... step_0(x))``. Which kind of step follows
from the shapes:

==============  =======================================================================================================
images          ``pool(x) + expand(blocks(enter(x)))``: 3x3 convolutions to ``inner`` channels (one for each halving of the
                picture), residual blocks of ``inner`` channels, 1x1 convolution to the stage's own; batch norm and ReLU;
                a rectifier at the end where the stage ends with one
token streams   ``x + expand(gelu(attention(causal convolution(narrow(norm(x))))))``, so many times; token ids are embedded
                first. Nothing of a later token reaches an earlier one
feature vectors ``linear(x) + expand(relu(...))`` by layers of ``inner`` features
==============  =======================================================================================================

Two streams of a reversible stage are taken as one of twice the channels. ``"module:callable"`` is one of the user's own: a
callable of ``(inputs, outputs)``, what the stage takes and gives for a blank sample, that makes a module from the one to the
other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ds_decoupled.errors import ConfigError
from ds_decoupled.tensors import Tensors, as_tuple, channel_dim, map_tensors

SETTING = "decoupled.auxnet.net"
OWN = 'Cut the stages elsewhere, or give a callable of your own, "net": "module:callable".'
_TAPS = 4  # of the causal convolution


def _conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)]


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*_conv(channels, channels), nn.ReLU(), *_conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.branch(x))


class ImageStep(nn.Module):
    """``(N, inputs, H, W)`` to ``(N, outputs, H', W')``, where the picture is halved ``halvings`` times (rounded up)."""

    def __init__(self, inputs: int, outputs: int, halvings: int, inner: int, blocks: int, shortcut: bool = True) -> None:
        super().__init__()
        channels = [inputs, *[inner] * max(1, halvings)]
        entry = [layer for a, b in zip(channels, channels[1:]) for layer in (*_conv(a, b, 2 if halvings else 1), nn.ReLU())]
        self.narrow = nn.Sequential(*entry, *(_Residual(inner) for _ in range(blocks)))
        self.expand = nn.Conv2d(inner, outputs, 1)
        self.shortcut: nn.Module | None = None
        if shortcut:
            pool = [nn.AvgPool2d(1 << halvings, ceil_mode=True)] if halvings else []
            self.shortcut = nn.Sequential(*pool, *([nn.Conv2d(inputs, outputs, 1)] if inputs != outputs else []))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.expand(self.narrow(x))
        return y if self.shortcut is None else y + self.shortcut(x)


class _CausalBlock(nn.Module):
    """Narrow, causal convolution, attention over it, wide again; ``(N, T, width)`` to the same shape."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.narrow = nn.Linear(width, inner)
        self.taps = nn.Conv1d(inner, inner, _TAPS, groups=inner)
        self.qkv = nn.Linear(inner, 3 * inner, bias=False)
        self.expand = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.narrow(self.norm(x))
        # The convolution tells positions apart, so that attention needs none.
        h = h + self.taps(F.pad(h.transpose(1, 2), (_TAPS - 1, 0))).transpose(1, 2)
        q, k, v = (part.unsqueeze(1) for part in self.qkv(h).chunk(3, dim=-1))
        y: Tensor = self.expand(F.gelu(h + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)))
        return y


class TokenStep(nn.Module):
    """``(N, T, inputs)``, or ids ``(N, T)`` of ``inputs`` tokens, to ``(N, T, outputs)``."""

    def __init__(self, inputs: int, outputs: int, ids: bool, inner: int, blocks: int, shortcut: bool = True) -> None:
        super().__init__()
        self.enter: nn.Module = nn.Identity()
        if ids:
            self.enter = nn.Embedding(inputs, outputs)
        elif inputs != outputs:
            self.enter = nn.Linear(inputs, outputs)
        self.blocks = nn.ModuleList(_CausalBlock(outputs, inner) for _ in range(blocks))
        self.shortcut = shortcut

    @property
    def expand(self) -> nn.Module:
        """The last layer."""
        return self.blocks[-1].expand  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks[:-1]:
            x = x + block(x)
        y: Tensor = self.blocks[-1](x)
        return x + y if self.shortcut else y


class FeatureStep(nn.Module):
    """``(N, ...)`` of ``inputs`` numbers to ``(N, outputs)``."""

    def __init__(self, inputs: int, outputs: int, inner: int, blocks: int, shortcut: bool = True) -> None:
        super().__init__()
        sizes = [inputs, *[inner] * (blocks + 1)]
        self.narrow = nn.Sequential(*(layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())))
        self.expand = nn.Linear(inner, outputs)
        self.shortcut: nn.Module | None = None
        if shortcut:
            self.shortcut = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        y: Tensor = self.expand(self.narrow(x))
        return y if self.shortcut is None else y + self.shortcut(x)


class _Rectified(torch.autograd.Function):
    """ReLU, whose zeros may rise: a gradient that asks for more goes through them too.

    What is drawn to a step's zeros becomes zero itself; were they as deaf as a ReLU's, both would stay there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        return grad * ((x > 0) | (grad < 0))


def rectified(x: Tensor) -> Tensor:
    """``x`` where it is above 0, else 0; see :class:`_Rectified` for the gradient."""
    y: Tensor = _Rectified.apply(x)
    return y


class Step(nn.Module):
    """A step on whatever its stage takes, to whatever it gives.

    Args:
        body: from one tensor to one.
        outputs: what the stage gives: one tensor, or several of which the channels are joined.

    Attributes:
        never_negative: of each tensor, whether the stage's is not, so that a rectifier ends the step too.
    """

    def __init__(self, body: nn.Module, outputs: Tensors) -> None:
        super().__init__()
        self.body = body
        self.never_negative = [False] * len(as_tuple(outputs))
        self._single = isinstance(outputs, Tensor)
        self._dim = channel_dim(as_tuple(outputs)[0].shape) or 1
        self._sizes = [t.shape[self._dim] for t in as_tuple(outputs)]
        self._types = [t.dtype for t in as_tuple(outputs)]

    def forward(self, inputs: Tensors) -> Tensors:
        parts = self.body(_joined(inputs)).split(self._sizes, dim=self._dim)
        ended = (rectified(part) if never else part for part, never in zip(parts, self.never_negative))
        cast = tuple(part.to(dtype).contiguous() for part, dtype in zip(ended, self._types))
        return cast[0] if self._single else cast


def _joined(tensors: Tensors) -> Tensor:
    parts = as_tuple(tensors)
    if parts[0].is_floating_point():
        parts = tuple(part.float() for part in parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=channel_dim(parts[0].shape) or 1)


def never_negative(layers: Callable[[Tensors], Tensors], inputs: Tensors) -> list[bool]:
    """Which tensors of ``layers``, in evaluation, have no value below 0 on noise of ``inputs``' shapes; none on token ids."""
    if not all(t.is_floating_point() for t in as_tuple(inputs)):
        return [False] * len(as_tuple(layers(inputs)))
    return [bool((t >= 0).all()) for t in as_tuple(layers(map_tensors(torch.randn_like, inputs)))]


def multiply_adds(module: Callable[..., Any], *inputs: Any) -> int:
    """Of convolutions and products of matrices in ``module(*inputs)``, by counting."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // 2


def build_step(inputs: Tensors, outputs: Tensors, *, budget: float, width: float | None, blocks: int, tokens: int,
               shortcut: bool = True) -> Step:
    """A step for a stage that takes ``inputs`` and gives ``outputs`` (of a blank sample, tensors of any device).

    Args:
        budget: multiply-adds that it may have; of several widths the largest is taken that stays within, and 1 where none does.
        width: inner channels as a part of those that it gives, in place of the budget.
        blocks: residual blocks.
        tokens: of the vocabulary, where it takes ids.
        shortcut: whether its input goes to its output; without, its last layer begins with zeros.

    Raises:
        ConfigError: for shapes that it cannot match.
    """
    make = _maker(inputs, outputs, blocks, tokens, shortcut)
    dim = channel_dim(as_tuple(outputs)[0].shape) or 1
    most = sum(t.shape[dim] for t in as_tuple(outputs))
    inner = max(1, round(width * most)) if width is not None else _widest(make, _blank(inputs, "meta"), budget, most)
    step = make(inner)
    if not shortcut:
        for parameter in step.body.expand.parameters():  # type: ignore[union-attr]
            nn.init.zeros_(parameter)
    return step


def _widest(make: Callable[[int], Step], blank: Tensors, budget: float, most: int) -> int:
    low, high = 1, max(1, most)
    with torch.device("meta"):
        while low < high:
            middle = (low + high + 1) // 2
            if multiply_adds(make(middle), blank) <= budget:
                low = middle
            else:
                high = middle - 1
    return low


def _blank(tensors: Tensors, device: str) -> Tensors:
    parts = tuple(torch.empty(t.shape, dtype=t.dtype, device=device) for t in as_tuple(tensors))
    return parts[0] if isinstance(tensors, Tensor) else parts


def _maker(inputs: Tensors, outputs: Tensors, blocks: int, tokens: int, shortcut: bool) -> Callable[[int], Step]:
    given, wanted = as_tuple(inputs), as_tuple(outputs)
    taken, made = given[0].shape, wanted[0].shape
    ids = not given[0].is_floating_point()
    enters, leaves = (sum(t.shape[channel_dim(t.shape) or 1] for t in side) for side in (given, wanted))
    if all(t.is_floating_point() for t in wanted) and _alike(given) and _alike(wanted):
        if len(made) == 4 and len(taken) == 4 and not ids:
            halvings = next((h for h in range(32) if all(-(-a >> h) == b for a, b in zip(taken[2:], made[2:]))), None)
            if halvings is not None:
                return lambda inner: Step(ImageStep(enters, leaves, halvings, inner, blocks, shortcut), outputs)
        if len(made) == 3 and taken[:2] == made[:2] and (len(taken) == 3 or ids and tokens):
            size = tokens if ids else enters
            return lambda inner: Step(TokenStep(size, leaves, ids, inner, blocks, shortcut), outputs)
        if len(made) == 2 and not ids and len(given) == 1 or len(made) == len(taken) == 2 and not ids:
            size = given[0][0].numel() if len(given) == 1 else enters
            return lambda inner: Step(FeatureStep(size, leaves, inner, blocks, shortcut), outputs)
    raise ConfigError(SETTING, None, f"no step leads from what the stage takes, {_words(given)}, to what it gives, "
                      f"{_words(wanted)}", OWN)


def _alike(tensors: tuple[Tensor, ...]) -> bool:
    """Whether they can be joined along their channels."""
    dim = channel_dim(tensors[0].shape) or 1
    rest = {(*t.shape[:dim], *t.shape[dim + 1:]) for t in tensors}
    return len(rest) == 1


def _words(tensors: tuple[Tensor, ...]) -> str:
    return " and ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors)


def own_step(name: str, inputs: Tensors, outputs: Tensors) -> nn.Module:
    """The user's own, ``"module:callable"``.

    Raises:
        ConfigError: if it cannot be imported or made.
    """
    module, _, attribute = name.partition(":")
    try:
        make: Callable[[Tensors, Tensors], nn.Module] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(SETTING, name, f"it cannot be imported ({error})", "Is the module on PYTHONPATH?") from error
    try:
        return make(inputs, outputs)
    except Exception as error:
        raise ConfigError(SETTING, name, f"it cannot be made for a stage that takes {_words(as_tuple(inputs))} and gives "
                          f"{_words(as_tuple(outputs))} ({type(error).__name__}: {error})",
                          "Mend it, or leave it out.") from error


def check_step(step: nn.Module, name: str | None, inputs: Tensors, outputs: Tensors) -> None:
    """It gives what its stage gives.

    Raises:
        ConfigError: naming both.
    """
    try:
        with torch.no_grad():
            made = step(inputs)
        fits = isinstance(made, Tensor) == isinstance(outputs, Tensor) and \
            [t.shape for t in as_tuple(made)] == [t.shape for t in as_tuple(outputs)]
        said = f"it gives {_words(as_tuple(made))}"
    except Exception as error:
        fits, said = False, f"it does not run on {_words(as_tuple(inputs))} ({type(error).__name__}: {error})"
    if not fits:
        raise ConfigError(SETTING, name, f"{said}, and its stage {_words(as_tuple(outputs))}",
                          OWN if name is None else "Mend it.")


__all__ = ["FeatureStep", "ImageStep", "Step", "TokenStep", "build_step", "check_step", "multiply_adds",
           "never_negative", "own_step"]
