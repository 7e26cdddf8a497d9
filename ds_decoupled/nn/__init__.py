"""Building blocks: couplings and block marks."""

from ds_decoupled.nn.blocks import block_starts, mark_block
from ds_decoupled.nn.coupling import ReversibleCoupling

__all__ = ["ReversibleCoupling", "block_starts", "mark_block"]
