"""Stepping stage by stage."""

from ds_decoupled.optim.by_name import client_from_json
from ds_decoupled.optim.client import ClientOptimizer
from ds_decoupled.optim.lr_by_delay import lr_divisor
from ds_decoupled.optim.stage_optimizer import StageOptimizer, StageOptimizers, restrict

__all__ = ["ClientOptimizer", "StageOptimizer", "StageOptimizers", "client_from_json", "lr_divisor", "restrict"]
