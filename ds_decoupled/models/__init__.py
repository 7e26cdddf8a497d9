"""Models as lists of layers, for recipes and tests; the engine does not import them."""

from ds_decoupled.models.registry import CLASSES, MODELS, build_model

__all__ = ["CLASSES", "MODELS", "build_model"]
