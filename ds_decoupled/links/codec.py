"""How floating-point values are written on the wire between ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Codec:
    """A codec that changes the type alone.

    Attributes:
        name: the setting's value.
        wire: the type in which float32 and float64 values travel; None leaves every value as it is.
    """

    name: str
    wire: torch.dtype | None

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which values of ``dtype`` travel."""
        return self.wire if self.wire is not None and dtype in (torch.float32, torch.float64) else dtype


CODECS = {codec.name: codec for codec in (Codec("none", None), Codec("bf16", torch.bfloat16))}
