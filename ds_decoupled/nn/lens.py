"""Heads that look at a stage through the rest of a pretrained model: a translator, a few of its later blocks, its own readout.

A *tuned lens* (Belrose et al. 2023, arXiv 2303.08112) is an affine translator before the model's own norm and unembedding. The
stream behind a lower block is not what these are used to: read by them as it is, it says less than nothing (SmolLM2-135M
behind 16 of 30 blocks: 21 nats a token, where guessing alike has 10.8). Here the translator comes first, then blocks picked as
AugLocal picks them (:mod:`ds_decoupled.nn.auglocal`)::

    stage's output h --> h + W h --> block --> ... --> block --> the model's last layer (norm, unembedding)
                         W = 0       copies, which learn         read-only, one for all heads of a rank

Only what differs between heads learns: the readout of a small model with a large vocabulary is most of its weights.
"""

from __future__ import annotations

from torch import Tensor, nn

from ds_decoupled.errors import ConfigError
from ds_decoupled.nn.auglocal import DEPTH
from ds_decoupled.tensors import Tensors, as_tuple

LENS = "lens"
"""The head's name; ``lens:n`` for n blocks between translator and readout, ``lens:n%`` for a share of those above the stage,
``lens:0`` for a tuned lens."""


def lens_depth(name: object) -> int | float | None:
    """How many blocks the head of every stage copies, if so many are left, or which share of them, below 1; None for a head of
    another kind.

    >>> lens_depth("lens"), lens_depth("lens:0"), lens_depth("lens:60%"), lens_depth("auglocal")
    (4, 0, 0.6, None)

    Raises:
        ConfigError: if the number is none.
    """
    if not isinstance(name, str) or not name.startswith(LENS):
        return None
    kind, colon, count = name.partition(":")
    number = count.removesuffix("%")
    share = number != count
    if kind != LENS or colon and not (number.isdigit() and (not share or 0 < int(number) < 100)):
        raise ConfigError("decoupled.head", name, f"heads that read through the rest of the model are named {LENS!r}, or "
                          f"'{LENS}:n' with n blocks before the model's last layer, or '{LENS}:n%' with a share of those above "
                          "the stage", f"For example '{LENS}:2' or '{LENS}:50%'; '{LENS}:0' is a translator alone.")
    return DEPTH if not colon else int(number) / 100 if share else int(number)


def lens_blocks(depth: int | float, above: int) -> int:
    """How many blocks that is, of so many ``above`` the stage.

    >>> lens_blocks(4, 3), lens_blocks(0.6, 22)
    (3, 13)
    """
    return min(depth, above) if isinstance(depth, int) else round(depth * above)


class Translator(nn.Module):
    """``x + W x`` of the stream, W beginning with 0; what travels beside it passes.

    Args:
        outputs: what the stage gives, ``(N, T, width)`` or ``(N, width)``, alone or first of a tuple.

    Raises:
        ConfigError: for a stream of another shape, or two streams.
    """

    def __init__(self, outputs: Tensors) -> None:
        super().__init__()
        stream, *beside = as_tuple(outputs)
        two = len(beside) == 1 and beside[0].shape == stream.shape and beside[0].is_floating_point()
        if stream.dim() not in (2, 3) or two:
            raise ConfigError("decoupled.head", LENS, "it translates one stream (N, T, width) or (N, width); the stage gives "
                              f"{[tuple(t.shape) for t in (stream, *beside)]}", "Take 'auglocal', whose copied layers see the "
                              "stream as it is.")
        self.change = nn.Linear(stream.shape[-1], stream.shape[-1], bias=False)
        nn.init.zeros_(self.change.weight)

    def forward(self, x: Tensors) -> Tensors:
        stream, *beside = as_tuple(x)
        translated: Tensor = stream + self.change(stream)
        return translated if isinstance(x, Tensor) else (translated, *beside)
