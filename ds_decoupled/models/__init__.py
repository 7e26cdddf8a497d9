"""Models as lists of layers, for recipes and tests; the engine does not import them."""

from typing import Any

from ds_decoupled.models.registry import CLASSES, MODELS, build_model
from ds_decoupled.models.transformer import SIZES, GPTConfig, build_gpt, next_token_loss

_HUGGING_FACE = ("from_hugging_face", "to_hugging_face")

__all__ = ["CLASSES", "MODELS", "SIZES", "GPTConfig", "build_gpt", "build_model", "next_token_loss",
           "from_hugging_face", "to_hugging_face"]


def __getattr__(name: str) -> Any:
    if name in _HUGGING_FACE:  # transformers is wanted for these alone
        from ds_decoupled.models import hugging_face

        return getattr(hugging_face, name)
    raise AttributeError(name)
