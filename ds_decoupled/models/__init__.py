"""Models as lists of layers, for recipes and tests; the engine does not import them."""

from ds_decoupled.models.registry import CLASSES, MODELS, build_model
from ds_decoupled.models.transformer import SIZES, GPTConfig, build_gpt, next_token_loss

__all__ = ["CLASSES", "MODELS", "SIZES", "GPTConfig", "build_gpt", "build_model", "next_token_loss"]
