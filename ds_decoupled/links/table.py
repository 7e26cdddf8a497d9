"""Which codecs there are, and which of them a message's parts travel by.

========  ======================  =====================  =====
message   part 0                  part 1                 part 2
========  ======================  =====================  =====
forward   output: ``forward``     labels: as they are
backward  gradients:              reconstruction:        loss: as it is
          ``backward``, by        ``forward``, to the
          chance                  nearest
========  ======================  =====================  =====

A gradient is rounded by chance, because an error that is 0 in the mean averages out over updates. An activation is used once,
so its error should be small. A reconstruction is an activation that goes down: the stage below inverts its couplings from it,
and what an error there does to the weights' gradients does not average out. It is rounded once, by the sender, which needs it
no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_decoupled.links.codec import Cast, Codec
from ds_decoupled.links.hadamard import RotatedInt4
from ds_decoupled.links.places import Codecs
from ds_decoupled.links.scalar import Float8, Int4, Int8
from ds_decoupled.links.vector import VectorCodec

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Codec(), Cast(), Float8(), Int8(), Int4(), RotatedInt4(),
                                                            VectorCodec())}
"""By the setting's value; ``"vq"`` with its default settings."""


def codecs_of(channel: str, forward: str, backward: str, vq: Mapping[str, Any] | None = None) -> Codecs:
    """The codecs of one side of a channel. Evaluation and exact gradients must be exact: as they are.

    Args:
        channel: its name.
        forward: the name of the codec of activations.
        backward: that of gradients.
        vq: the settings of ``"vq"``; None for the defaults.
    """
    up = VectorCodec(**vq) if forward == VectorCodec.name and vq is not None else CODECS[forward]
    if channel == "forward":
        return Codecs(up)
    return Codecs(CODECS[backward].by_chance(), up) if channel == "backward" else Codecs()
