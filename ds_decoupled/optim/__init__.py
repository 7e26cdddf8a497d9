"""Stepping stage by stage."""

from ds_decoupled.optim.building import build_optimizers, build_schedulers, without_optimizers
from ds_decoupled.optim.by_name import client_from_json
from ds_decoupled.optim.lock_free import Hand, check_lock_free
from ds_decoupled.optim.lr_by_delay import lr_divisor
from ds_decoupled.optim.stage_optimizer import StageOptimizer, StageOptimizers

__all__ = ["Hand", "StageOptimizer", "StageOptimizers", "build_optimizers", "build_schedulers", "check_lock_free",
           "client_from_json", "lr_divisor", "without_optimizers"]
