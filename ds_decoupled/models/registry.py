"""Models by name."""

from __future__ import annotations

from collections.abc import Callable

from deepspeed.pipe import LayerSpec

from ds_decoupled.errors import ConfigError
from ds_decoupled.models.cifar import cifar_layers
from ds_decoupled.models.cnn import WIDTH, cnn_layers
from ds_decoupled.models.residual import ARCHITECTURES
from ds_decoupled.models.resnet import resnet_layers
from ds_decoupled.models.revnet import revnet_layers
from ds_decoupled.nn import mark_block

_FAMILIES: dict[str, Callable[..., list[LayerSpec]]] = {"revnet": revnet_layers, "resnet": resnet_layers}

#: Of small images: depth, whether wide, and the channels of the first group (16 k of a WideResNet).
SMALL: dict[str, tuple[int, bool, int]] = {
    **{f"resnet{depth}": (depth, False, 16) for depth in (20, 32, 44, 56, 110)},
    "wideresnet16": (16, True, 128), "wideresnet28": (28, True, 160)}

MODELS = (*(family + depth for family in _FAMILIES for depth in ARCHITECTURES), "cnn6", *SMALL)
"""Names that :func:`build_model` knows."""

CLASSES = {"cifar10": 10, "imagenet": 1000, "imagenet32": 1000, "digits": 10}
"""Data that :func:`build_model` has a form for, with its number of classes."""


def build_model(name: str, data: str = "cifar10", num_classes: int | None = None, width: int | None = None) -> list[LayerSpec]:
    """A model as DeepSpeed layer specs: stem, one per residual block, head, each marked as the start of a block.

    So there are J = 10 / 18 / 18 layers for depth 18 / 34 / 50. The first takes images ``(N, 3, H, W)``, the last gives
    logits ``(N, num_classes)``; between a RevNet's layers travels the tuple ``(x1, x2)``, between a ResNet's a tensor.
    ``cnn6`` has six blocks (:mod:`ds_decoupled.models.cnn`); ``resnet20`` to ``resnet110`` and the WideResNets have stem, one
    layer a block, head (:mod:`ds_decoupled.models.cifar`).

    Args:
        name: one of ``MODELS``.
        data: ``imagenet`` gives the 7x7 stride-2 stem with max-pool, any other of ``CLASSES`` the 3x3 stem without.
        num_classes: outputs of the head; by default those of ``data``.
        width: channels of the first group, by default those of the papers: 64, or 128 of ``cnn6``; the others have 2, 4 and
            8 times as many. Of the networks for small images 16, 16 k of WideResNet-k: 128 (k = 8) at depth 16, 160
            (k = 10) at depth 28; two groups follow.

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
    usual = WIDTH if name == "cnn6" else SMALL[name][2] if name in SMALL else 64
    channels = usual if width is None else width
    for setting, value in (("num_classes", classes), ("width", channels)):
        if value < 1:
            raise ConfigError(setting, value, "it must be a whole number of at least 1")
    if data == "imagenet" and (name == "cnn6" or name in SMALL):
        raise ConfigError("data", data, f"{name} is for small images", "Take resnet18 or revnet18, or imagenet32.")
    if name in SMALL:
        depth_of_small, wide, _ = SMALL[name]
        return [mark_block(layer) for layer in cifar_layers(depth_of_small, wide, num_classes=classes, width=channels)]
    if name == "cnn6":
        *convolutions, classifier = cnn_layers(num_classes=classes, width=channels)
        return [*(mark_block(layer) for layer in convolutions), classifier]
    family, depth = name[:-2], name[-2:]
    layers = _FAMILIES[family](ARCHITECTURES[depth], imagenet=data == "imagenet", num_classes=classes, width=channels)
    return [mark_block(layer) for layer in layers]
