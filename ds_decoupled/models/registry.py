"""Models by name."""

from __future__ import annotations

from collections.abc import Callable

from deepspeed.pipe import LayerSpec

from ds_decoupled.errors import ConfigError
from ds_decoupled.models.cnn import WIDTH, cnn_layers
from ds_decoupled.models.residual import ARCHITECTURES
from ds_decoupled.models.resnet import resnet_layers
from ds_decoupled.models.revnet import revnet_layers
from ds_decoupled.nn import mark_block

_FAMILIES: dict[str, Callable[..., list[LayerSpec]]] = {"revnet": revnet_layers, "resnet": resnet_layers}

MODELS = (*(family + depth for family in _FAMILIES for depth in ARCHITECTURES), "cnn6")
"""Names that :func:`build_model` knows."""

CLASSES = {"cifar10": 10, "imagenet": 1000, "imagenet32": 1000, "digits": 10}
"""Data that :func:`build_model` has a form for, with its number of classes."""


def build_model(name: str, data: str = "cifar10", num_classes: int | None = None, width: int | None = None) -> list[LayerSpec]:
    """A model as DeepSpeed layer specs: stem, one per residual block, head, each marked as the start of a block.

    So there are J = 10 / 18 / 18 layers for depth 18 / 34 / 50. The first takes images ``(N, 3, H, W)``, the last gives
    logits ``(N, num_classes)``; between a RevNet's layers travels the tuple ``(x1, x2)``, between a ResNet's a tensor.
    ``cnn6`` has six blocks (:mod:`ds_decoupled.models.cnn`).

    Args:
        name: one of ``MODELS``.
        data: ``imagenet`` gives the 7x7 stride-2 stem with max-pool, any other of ``CLASSES`` the 3x3 stem without.
        num_classes: outputs of the head; by default those of ``data``.
        width: channels of the first group, by default those of the papers: 64, or 128 of ``cnn6``; the others have 2, 4 and
            8 times as many.

    Raises:
        ConfigError: an unknown ``name`` or ``data``, or a ``num_classes`` or ``width`` below 1.
    """
    if name not in MODELS:
        raise ConfigError("model", name, f"choose one of {', '.join(MODELS)}")
    if data not in CLASSES:
        raise ConfigError(
            "data",
            data,
            f"choose one of {', '.join(CLASSES)}",
            "For images of your own give 'cifar10' (small images) or 'imagenet' (large ones) and num_classes",
        )
    classes = CLASSES[data] if num_classes is None else num_classes
    channels = (WIDTH if name == "cnn6" else 64) if width is None else width
    for setting, value in (("num_classes", classes), ("width", channels)):
        if value < 1:
            raise ConfigError(setting, value, "it must be a whole number of at least 1")
    if name == "cnn6":
        if data == "imagenet":
            raise ConfigError("data", data, "cnn6 is for small images", "Take a ResNet or a RevNet, or imagenet32.")
        *convolutions, classifier = cnn_layers(num_classes=classes, width=channels)
        return [*(mark_block(layer) for layer in convolutions), classifier]
    family, depth = name[:-2], name[-2:]
    layers = _FAMILIES[family](ARCHITECTURES[depth], imagenet=data == "imagenet", num_classes=classes, width=channels)
    return [mark_block(layer) for layer in layers]
