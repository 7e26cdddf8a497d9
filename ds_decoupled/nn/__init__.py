"""Building blocks: couplings, heads and block marks."""

from ds_decoupled.nn.blocks import block_starts, mark_block
from ds_decoupled.nn.coupling import ReversibleCoupling
from ds_decoupled.nn.heads import HEADS, build_head

__all__ = ["HEADS", "ReversibleCoupling", "build_head", "block_starts", "mark_block"]
