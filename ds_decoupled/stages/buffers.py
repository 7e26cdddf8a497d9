"""Buffers move once per micro-batch, in the pass that the gradients come from.

Batch norm's statistics, counters, moving averages, spectral norm's vectors: whatever a layer keeps in its buffers moves when
the layer runs. Where the backward pass runs the forward again, that second pass moves them, and the first leaves them as they
were (PETRA, arXiv 2406.02052, says so of batch norm). So does every pass that does not count: the exact gradient, the blank
sample that heads are built from, an inverse.

Normalisation layers of torch need no copies: while ``track_running_stats`` is off they normalise by the batch and leave their
statistics alone. Other buffers are copied before and put back after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.utils import logger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

#: Bytes up to which a buffer is copied in every pass. A larger one (a mask, a table of positions) is copied in the first pass,
#: and after that only if it has ever moved.
_SMALL = 1 << 16

_Key = tuple[int, str]


class Buffers:
    """The buffers of some layers.

    Args:
        layers: modules and functions; functions have none.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        modules = [m for layer in layers if isinstance(layer, nn.Module) for m in layer.modules()]
        self._norms = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats]
        norms = set(map(id, self._norms))
        self._others = [m for m in modules if id(m) not in norms]
        self._moving: set[_Key] = set()  # large ones that have moved
        self._first = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, layers run as in training; behind, their buffers are what they were.

        Modules in evaluation mode (frozen by the user) go on using the statistics they have.
        """
        training = [norm for norm in self._norms if norm.training]
        for norm in training:
            norm.track_running_stats = False
        try:
            with self._put_back(self._others):
                yield
        finally:
            for norm in training:
                norm.track_running_stats = True

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """As :meth:`held`, but every layer runs the very operations of training: normalisation layers move their statistics and
        get them back."""
        with self._put_back([*self._others, *self._norms]):
            yield

    @contextmanager
    def _put_back(self, modules: list[Any]) -> Iterator[None]:
        before: dict[_Key, tuple[nn.Module, Tensor | None, int, Tensor | None]] = {}
        for index, module in enumerate(modules):
            for name, buffer in module._buffers.items():
                key = index, name
                copied = buffer is not None and (self._first or buffer.nbytes <= _SMALL or key in self._moving
                                                 or isinstance(module, _NormBase))
                before[key] = (module, buffer, 0 if buffer is None else buffer._version, buffer.clone() if copied else None)
        self._first = False
        try:
            yield
        finally:
            with torch.no_grad():
                for key, (module, buffer, version, copy) in before.items():
                    module._buffers[key[1]] = buffer  # it may have been replaced, not written to
                    if buffer is None:
                        continue
                    moved = buffer._version != version
                    if copy is not None:
                        # Whether it moved or not: torch's batch norm writes without a new version. And behind autograd's back:
                        # a graph that saved a buffer that did not move must not find a new version either.
                        buffer.data.copy_(copy)
                    if moved and key not in self._moving:
                        self._moved(key, module, buffer, copied=copy is not None)

    def _moved(self, key: _Key, module: nn.Module, buffer: Tensor, copied: bool) -> None:
        self._moving.add(key)
        if not copied:
            logger.warning("the buffer %r of a %s (%d bytes) had not moved in earlier micro-batches and moves now; for this "
                           "one it moves twice, from the next on once", key[1], type(module).__name__, buffer.nbytes)
