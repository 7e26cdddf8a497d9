"""Stepping stage by stage."""

from ds_decoupled.optim.stage_optimizer import StageOptimizer, StageOptimizers, client_for_stage, restrict

__all__ = ["StageOptimizer", "StageOptimizers", "client_for_stage", "restrict"]
