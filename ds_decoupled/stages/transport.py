"""The transport penalty: what a stage's residual layers add is to be small.

"Module-wise training of neural networks via the minimizing movement scheme" (TRGL, NeurIPS 2023, arXiv 2309.17357): a greedily
trained module T, with its own classifier F, learns from

    L(F, T) + 1/(2 tau) * mean over samples of  sum over residual layers m of |r_m|^2,     x_(m+1) = x_m + r_m

the kinetic energy of its residual layers, which keeps a lower module from spending early what those above it need. Here
``"transport"`` is the factor, and the squared norm is the mean over a layer's numbers, so that the same factor serves every
width and picture size: ``transport = dimension / (2 tau)``.

The paper's extension to layers that are not residual holds too: the difference is taken wherever a layer gives the shapes that
it takes. Of a reversible coupling ``(x1, x2) -> (x2 + f(x1), x1)`` it is ``f(x1)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from torch import Tensor

from ds_decoupled.errors import ConfigError
from ds_decoupled.nn.coupling import ReversibleCoupling
from ds_decoupled.stages.layers import Layers
from ds_decoupled.tensors import Form, as_tuple


def added(layer: Any, given: Any, made: Any) -> list[Tensor]:
    """What ``layer`` adds to each floating-point tensor that passes through it; nothing where shapes change."""
    before, after = as_tuple(given), as_tuple(made)
    if isinstance(layer, ReversibleCoupling):  # the streams swap: only one of them was added to
        before, after = before[1:2], after[:1]
    if [t.shape for t in before] != [t.shape for t in after]:
        return []
    # What passes through as it is (a mask) adds nothing, and is the very same tensor.
    return [y - x for x, y in zip(before, after) if y is not x and x.is_floating_point() and y.is_floating_point()]


def check_transport(factor: float, forms: Sequence[Form]) -> None:
    """A penalty needs something to penalise.

    Args:
        factor: the setting.
        forms: what the layers of the whole model give.

    Raises:
        ConfigError: if no layer gives the shapes that it takes.
    """
    if factor and not any(given == made for given, made in pairwise(forms)):
        raise ConfigError("decoupled.transport", factor, "no layer of this model gives the shapes that it takes, so that none "
                          "adds to what passes through it", "Leave it out.")


class Transport:
    """The penalty of one stage.

    Args:
        factor: of the penalty in the stage's loss.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    @contextmanager
    def of(self, layers: Layers) -> Iterator[list[Tensor]]:
        """Within, the penalty of each layer that runs is put into the list: a scalar, in the layers' graph."""
        parts: list[Tensor] = []

        def listen(layer: Any, given: Any, made: Any) -> None:
            parts.extend(r.float().square().mean() * self.factor for r in added(layer, given, made))

        with layers.listening(listen):
            yield parts
