"""How a stage goes forward and back: by its graph, by recomputation, by reconstruction; with a loss of its own."""

from ds_decoupled.stages.local import LocalStage
from ds_decoupled.stages.outcome import Outcome
from ds_decoupled.stages.randomness import LayerSeeds
from ds_decoupled.stages.reversible import Invertible, is_invertible
from ds_decoupled.stages.stage import Shared, Stage

__all__ = ["Invertible", "LayerSeeds", "LocalStage", "Outcome", "Shared", "Stage", "is_invertible"]
