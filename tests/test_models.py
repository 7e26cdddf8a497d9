"""RevNet and ResNet: parameter counts, shapes, blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_decoupled.errors import ConfigError
from ds_decoupled.models import MODELS, build_model
from ds_decoupled.nn import ReversibleCoupling, block_starts

RESIDUAL = [name for name in MODELS if name.startswith("revnet") or name in ("resnet18", "resnet34", "resnet50")]
SMALL = [name for name in MODELS if name != "cnn6" and name not in RESIDUAL]


def build(name: str, **options: Any) -> nn.Sequential:
    return nn.Sequential(*(spec.build() for spec in build_model(name, **options)))


# Counted on the PETRA authors' code; ResNet-34's follow from torchvision's plus one bias a channel.
@pytest.mark.parametrize(
    ("name", "data", "parameters"),
    [
        ("revnet18", "imagenet", 12_215_912),
        ("revnet34", "imagenet", 22_327_784),
        ("revnet50", "imagenet", 30_421_608),
        ("resnet18", "imagenet", 11_694_312),
        ("resnet34", "imagenet", 21_797_672 + 8_512),
        ("resnet50", "imagenet", 25_583_592),
        ("revnet18", "cifar10", 11_185_802),
        ("revnet34", "cifar10", 21_297_674),
        ("revnet50", "cifar10", 26_350_218),
        ("resnet18", "cifar10", 11_178_762),
        ("resnet18", "digits", 11_178_762),
        ("cnn6", "cifar10", 6_813_450),
    ],
)
def test_parameter_counts(name: str, data: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build(name, data=data)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("depth", "blocks", "reversible"), [("18", 10, 5), ("34", 18, 13), ("50", 18, 12)])
def test_every_layer_starts_a_block(depth: str, blocks: int, reversible: int) -> None:
    for family in ("revnet", "resnet"):
        layers = build_model(family + depth)
        assert len(layers) == blocks
        assert block_starts(layers) == list(range(blocks))
    with torch.device("meta"):
        couplings = [layer for layer in build("revnet" + depth) if isinstance(layer, ReversibleCoupling)]
    assert len(couplings) == reversible


@pytest.mark.parametrize("name", RESIDUAL)
@pytest.mark.parametrize(("data", "size", "first", "last"), [("cifar10", 32, 32, 4), ("imagenet", 64, 16, 2)])
def test_shapes(name: str, data: str, size: int, first: int, last: int) -> None:
    model = build(name, data=data, num_classes=7, width=4)
    x: Tensor | tuple[Tensor, ...] = torch.randn(2, 3, size, size)
    expansion = 4 if name.endswith("50") else 1
    shapes = []
    for layer in model:
        x = layer(x)
        tensors = x if isinstance(x, tuple) else (x,)
        assert all(t.is_contiguous() for t in tensors)
        assert len({t.shape for t in tensors}) == 1
        assert len(tensors) == (2 if name.startswith("revnet") and layer is not model[-1] else 1)
        shapes.append(tuple(tensors[0].shape))
    assert shapes[0] == (2, 4, first, first)
    assert shapes[-2] == (2, 32 * expansion, last, last)
    assert shapes[-1] == (2, 7)


# ResNet-20 and 110 as counted on the common PyTorch re-implementation of the paper's option A; the WideResNets on the
# authors' architecture, whose paper gives 36.5 M, 11.0 M, 2.7 M and 1.5 M.
@pytest.mark.parametrize(("name", "width", "parameters"), [
    ("resnet20", None, 269_722), ("resnet110", None, 1_727_962), ("wideresnet28", None, 36_479_194),
    ("wideresnet28", 32, 1_467_610), ("wideresnet16", 64, 2_748_890), ("wideresnet16", None, 10_961_370)])
def test_parameter_counts_of_networks_for_small_images(name: str, width: int | None, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name, width=width).parameters()) == parameters


@pytest.mark.parametrize("name", SMALL)
def test_networks_for_small_images(name: str) -> None:
    """Three groups; every layer is a block; large images are refused."""
    layers = build_model(name, width=4)
    depth = int(name.removeprefix("wide").removeprefix("resnet"))
    assert block_starts(layers) == list(range(len(layers))) and len(layers) == 2 + 3 * ((depth - 2) // 6)
    x, shapes = torch.randn(2, 3, 16, 16), []
    for layer in build(name, width=4):
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert list(dict.fromkeys(shapes[1:])) == [(4, 16, 16), (8, 8, 8), (16, 4, 4), (10,)]
    with pytest.raises(ConfigError, match="small images"):
        build_model(name, data="imagenet")


def test_six_layer_cnn() -> None:
    """Six blocks; the classifier belongs to the last. Two poolings, where the channels double."""
    layers = build_model("cnn6", width=4)
    assert block_starts(layers) == [0, 1, 2, 3, 4, 5] and len(layers) == 7
    x, shapes = torch.randn(2, 3, 32, 32), []
    for layer in build("cnn6", width=4):
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 32, 32), (8, 16, 16), (8, 16, 16), (16, 8, 8), (16, 8, 8), (16, 8, 8), (10,)]


@pytest.mark.parametrize("name", MODELS)
def test_no_layer_changes_its_input(name: str) -> None:
    x: Tensor | tuple[Tensor, ...] = torch.randn(2, 3, 16, 16)
    for layer in build(name, width=2):
        before = [t.clone() for t in (x if isinstance(x, tuple) else (x,))]
        y = layer(x)
        after = x if isinstance(x, tuple) else (x,)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        x = y


@pytest.mark.parametrize("name", ["revnet18", "revnet50"])
def test_reversible_blocks_invert(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, width=4).double()
    streams = model[0](torch.randn(4, 3, 16, 16, dtype=torch.float64))
    for layer in list(model)[1:-1]:
        outputs = layer(streams)
        if isinstance(layer, ReversibleCoupling):
            x1, x2 = layer.inverse(outputs)
            assert torch.equal(x1, streams[0])
            torch.testing.assert_close(x2, streams[1])
        streams = outputs


@pytest.mark.parametrize("name", ["revnet18", "revnet50", "resnet18"])
def test_bfloat16_parameters_take_float32_streams(name: str) -> None:
    model = build(name, width=4).bfloat16()
    logits = model(torch.randn(2, 3, 16, 16))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("revnet19", {}, "'revnet19'.*revnet18, revnet34, revnet50, resnet18"),
        ("revnet18", {"data": "mnist"}, "'mnist'.*cifar10, imagenet, imagenet32, digits"),
        ("revnet18", {"num_classes": 0}, '"num_classes": 0.*at least 1'),
        ("cnn6", {"data": "imagenet"}, "'imagenet'.*small images"),
        ("revnet18", {"width": -1}, '"width": -1.*at least 1'),
    ],
)
def test_errors_say_what_is_allowed(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, **options)


def test_gpt_sizes() -> None:
    """The plain one has GPT-2's matrices, its head not tied; both are causal and differ in nothing but their streams."""
    import torch

    from ds_decoupled.models import SIZES, GPTConfig, build_gpt

    assert len(build_gpt("tiny")) == 2 + 2 * 4 and len(build_gpt("small")) == 26
    config = GPTConfig(blocks=2, width=32, heads=4, vocab_size=50)
    for reversible in (True, False):
        net = torch.nn.Sequential(*(spec.build() for spec in build_gpt(config, reversible))).eval()
        parameters = sum(p.numel() for p in net.parameters())
        assert parameters == 2 * 50 * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32
        ids = torch.randint(0, 50, (2, 9))
        changed = ids.clone()
        changed[:, 6] = (changed[:, 6] + 1) % 50
        a, b = net(ids), net(changed)
        assert a.shape == (2, 9, 50)
        assert torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6:], b[:, 6:])
    matrices = SIZES["small"].blocks * 12 * SIZES["small"].width ** 2
    assert matrices == 84934656  # GPT-2 small's 124 M without embeddings, norms and biases
