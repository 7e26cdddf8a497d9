"""Codecs against slow, plain definitions of themselves: what arrives, and how many bytes it takes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ds_decoupled.config import CodecName
from ds_decoupled.links import CODECS, Message, Packed, codecs_of, pack
from ds_decoupled.links import message as wire
from ds_decoupled.links.codec import FLOATS, Codec
from ds_decoupled.links.hadamard import hadamard
from ds_decoupled.links.scalar import Float8, Int4, Int8

CPU = torch.device("cpu")
#: Those that keep nothing from one tensor to the next; "vq" has tests/test_vector_codec.py.
STATELESS = [name for name in CODECS if name != "vq"]
SCALED = ["fp8", "int8", "int4", "int4-rotated"]
LEVELS = {"fp8": 448.0, "int8": 127.0, "int4": 7.0, "int4-rotated": 7.0}
#: Of every number of dimensions, with odd counts, and one that no power of two divides.
SHAPES = [(64,), (129,), (16, 24), (7, 33), (5, 9, 12), (3, 6, 5, 7), (2, 64, 4, 4), (2, 5, 3, 4, 5), (9, 96)]
OTHERS = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint16, torch.bool, torch.complex64, torch.complex32,
          torch.float8_e4m3fn, torch.float8_e5m2]


def there_and_back(codec: Codec, tensor: Tensor, key: tuple[int, ...] = (1, 2, 3)) -> Tensor:
    """``tensor`` by way of a buffer of exactly the bytes that the codec asks for."""
    buffer = torch.full((codec.nbytes(tensor.shape, tensor.dtype),), 0xAB, dtype=torch.uint8)
    codec.write(tensor, buffer, key)
    return codec.read(buffer, tensor.shape, tensor.dtype, CPU)


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def channels(tensor: Tensor) -> list[Tensor]:
    """Views of what shares a scale."""
    dim = {2: 1, 3: 2, 4: 1}.get(tensor.dim())
    return [tensor] if dim is None else list(tensor.unbind(dim))


def by_hand(name: str, x: Tensor) -> Tensor:
    """The definition, channel by channel and number by number."""
    y = x.to(torch.float32).clone()
    if name == "int4-rotated":
        y = rotated_by_hand(y)
    for channel in channels(y):
        scale = (channel.abs().max() / LEVELS[name]).item()
        for index in range(channel.numel()):
            place = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), channel.shape))
            # float32's own quotient and product, as one number at a time.
            value = torch.tensor(channel[place].item()) / torch.tensor(scale) if scale else torch.tensor(0.0)
            code = value.to(torch.float8_e4m3fn).float() if name == "fp8" else torch.tensor(float(round(value.item())))
            channel[place] = code * torch.tensor(scale)
    return (rotated_by_hand(y) if name == "int4-rotated" else y).to(x.dtype)


def rotated_by_hand(x: Tensor) -> Tensor:
    """Every block of channels by the matrix whose entry (i, j) is -1 to the number of bits that i and j share."""
    dim = {2: 1, 3: 2, 4: 1}.get(x.dim())
    if dim is None:
        return x
    block = next(size for size in (64, 32, 16, 8, 4, 2, 1) if x.shape[dim] % size == 0)
    matrix = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]) / math.sqrt(block)
    by_channel = x.movedim(dim, -1)
    turned = torch.cat([part @ matrix for part in by_channel.split(block, -1)], -1)
    return turned.movedim(-1, dim).contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCALED)
def test_definition(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    came, expected = there_and_back(CODECS[name], x), by_hand(name, x)
    if name == "int4-rotated":  # products of matrices add up in another order
        torch.testing.assert_close(came, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(came, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SCALED)
def test_every_float(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 31, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    came = there_and_back(CODECS[name], x)
    assert came.dtype == dtype and came.shape == x.shape
    if name != "int4-rotated":
        assert torch.equal(came, by_hand(name, x))


@pytest.mark.parametrize(("name", "part"), [("int8", 0.5), ("int4", 0.5), ("fp8", None)])
def test_error_is_half_a_step(name: str, part: float | None) -> None:
    """Of its own channel: a large one makes no other coarse. fp8's step is a part of the number itself, 2**-4 of it at most, or
    half of 2**-9 scales."""
    x = torch.randn(8, 6, 9, 9, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 6, 6).view(1, 6, 1, 1)
    came = there_and_back(CODECS[name], x)
    scale = x.abs().amax((0, 2, 3), keepdim=True) / LEVELS[name]
    allowed = torch.maximum(x.abs() * 2**-4, scale * 2**-10) if part is None else scale * part
    assert ((came - x).abs() <= allowed * (1 + 1e-4)).all()
    assert ((came - x).abs() > allowed * 0.9).any(), "the bound says nothing"


def test_rotation_is_its_own_inverse() -> None:
    for size in (1, 2, 8, 64):
        matrix = hadamard(size, CPU)
        assert torch.equal(matrix, matrix.mT)
        torch.testing.assert_close(matrix @ matrix, torch.eye(size))


def test_rotation_helps_where_few_features_are_large() -> None:
    """As in the hidden states of language models; each number has the scale of its feature over all tokens."""
    x = torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(2))
    x[:, torch.arange(256), torch.arange(256) % 64] *= 30  # every feature is large at some tokens
    plain, turned = (float((there_and_back(CODECS[name], x) - x).norm()) for name in ("int4", "int4-rotated"))
    assert turned < 0.7 * plain


@pytest.mark.parametrize("count", [*range(12), 63, 64, 65, 300, 301])
def test_packing_is_exact(count: int) -> None:
    """Two codes a byte, the last one alone where the count is odd."""
    codes = torch.randint(-7, 8, (count,), dtype=torch.int8, generator=torch.Generator().manual_seed(count))
    codec = Int4()
    packed = codec.pack(codes.view(torch.uint8))
    assert packed.numel() == codec.packed_bytes(count) == (count + 1) // 2
    half = (count + 1) // 2
    by_hand = [int(codes[i]) % 16 + (int(codes[i + half]) % 16 * 16 if i + half < count else 0) for i in range(half)]
    assert packed.tolist() == by_hand
    assert torch.equal(codec.unpack(packed, count), codes)


# By chance


def steps(codec: Codec, x: Tensor) -> Tensor:
    """The distance between the two codes around each number."""
    scale = (x.abs().amax(0) / LEVELS[codec.name]).expand_as(x)
    if codec.name != "fp8":
        return scale
    exponents = [max(math.frexp(v)[1] - 1, -6) for v in (x / scale).reshape(-1).tolist()]
    return torch.tensor([2.0 ** (e - 3) for e in exponents]).view(x.shape) * scale


@pytest.mark.parametrize("codec", [Int8(), Int4(), Float8()], ids=lambda codec: codec.name)
def test_chance_keeps_the_mean(codec: Any) -> None:
    """Of every number within 4 standard errors, and of all together; each becomes one of the two codes around it."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 1e-3, 10.0, 0.1])
    x[1] = 0.0
    x[2:12] *= 0.1  # to the nearest many would become 0
    chance, draws = codec.by_chance(), 2000
    came = torch.stack([there_and_back(chance, x, (0, m, 1)) for m in range(draws)]).double()
    step = steps(codec, x).double()
    part = (x.double() / step).frac().abs()  # the chance of the code that is farther from 0
    deviation = step * (part * (1 - part)).sqrt() / math.sqrt(draws)  # of the mean
    error = came.mean(0) - x
    often = (part > 0.01) & (part < 0.99)  # else the mean of so few events is no normal number
    assert often.double().mean() > 0.7
    assert (error.abs() <= 4 * deviation + 1e-6 * x.abs())[often].all()
    assert abs(float((error / step).sum())) <= 4 * float((deviation / step).square().sum().sqrt())
    assert (came[:, 1] == 0).all()
    assert all(len(number.unique()) <= 2 for number in came.flatten(1).T)
    assert ((came - x).abs() <= step * (1 + 1e-4)).all()


def test_chance_is_named_by_its_key() -> None:
    """The same key draws the same, any other does not; nothing of torch's own generator is used."""
    x = torch.randn(40, 8)
    chance = CODECS["int8"].by_chance()
    state = torch.get_rng_state()
    first = there_and_back(chance, x, (7, 0, 5, 1))
    assert torch.equal(first, there_and_back(chance, x, (7, 0, 5, 1)))
    assert torch.equal(state, torch.get_rng_state())
    for key in ((8, 0, 5, 1), (7, 1, 5, 1), (7, 0, 6, 1), (7, 0, 5, 0), (-7, 0, 5, 1)):
        assert not torch.equal(first, there_and_back(chance, x, key))
    assert torch.equal(there_and_back(CODECS["int8"], x), by_hand("int8", x)), "the twin changed the codec"
    assert CODECS["bf16"].by_chance() is CODECS["bf16"] and CODECS["none"].by_chance() is CODECS["none"]


# What travels as it is


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", STATELESS)
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_other_types_travel_as_they_are(name: str, dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (10, 20)).to(dtype)
    assert CODECS[name].nbytes(x.shape, dtype) == 200 * dtype.itemsize
    came = there_and_back(CODECS[name].by_chance(), x)
    assert came.dtype == dtype and bits(came) == bits(x)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("shape", [(), (0,), (0, 64), (64, 0, 2), (63,), (7, 9), (1, 512), (1, 1, 200)])
def test_what_is_small_travels_as_it_is(name: str, shape: tuple[int, ...]) -> None:
    """Losses, a few numbers, nothing at all; and where scales would take more bytes than they save."""
    x = torch.randn(shape)
    assert CODECS[name].nbytes(shape, x.dtype) == 4 * x.numel()
    assert torch.equal(there_and_back(CODECS[name], x), x)


@pytest.mark.parametrize("name", STATELESS)
def test_strides_do_not_matter(name: str) -> None:
    x = torch.randn(4, 6, 8, 10)
    ways = [x.permute(0, 2, 3, 1), x.transpose(2, 3), x[:, :, ::2], x.to(memory_format=torch.channels_last), x[0].mT, x[0, 0].T]
    for view in (*ways, x[:, :1].expand(4, 6, 8, 10)):
        came = there_and_back(CODECS[name], view)
        torch.testing.assert_close(came, there_and_back(CODECS[name], view.contiguous()), rtol=1e-5, atol=1e-6)
        assert came.shape == view.shape and came.is_contiguous()


@pytest.mark.parametrize("name", STATELESS)
@pytest.mark.parametrize("chance", [False, True])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_as_such(name: str, chance: bool, wrong: float) -> None:
    """Never as a number; and other channels do not suffer, but for those of a rotation's block."""
    x = torch.randn(8, 6, 5, 5)
    x[3, 2, 1, 1] = wrong
    codec = CODECS[name].by_chance() if chance else CODECS[name]
    came = there_and_back(codec, x)
    assert not came[3, 2, 1, 1].isfinite()
    others = [0, 1, 4, 5] if name == "int4-rotated" else [0, 1, 3, 4, 5]
    assert came[:, others].isfinite().all()
    whole = torch.full((9, 64), wrong)
    assert not there_and_back(codec, whole).isfinite().any()


@pytest.mark.parametrize("chance", [False, True])
@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_extreme_numbers(name: str, chance: bool) -> None:
    """What float32 holds arrives finite; a channel of subnormal scale as 0, and zeros as 0."""
    codec = CODECS[name].by_chance() if chance else CODECS[name]
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([largest, -largest, 1e-44, 0.0]).repeat(32, 1)
    x[::2, 3] = -0.0
    came = there_and_back(codec, x)
    assert came.isfinite().all() and (came[:, 2:] == 0).all()
    torch.testing.assert_close(came[:, :2], x[:, :2], rtol=1e-5, atol=0)
    too_large = there_and_back(codec, torch.full((64, 2), 1e300, dtype=torch.float64))
    assert not too_large.isfinite().any()


# Messages


def test_sizes_against_a_count() -> None:
    """Of every codec, for an image batch, a token batch and an odd vector: float32 and what remains."""
    def size(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> int:
        return CODECS[name].nbytes(shape, dtype)

    count = 16 * 64 * 8 * 8
    assert [size(name, 16, 64, 8, 8) for name in STATELESS] == [
        4 * count, 2 * count, count + 4 * 64, count + 4 * 64, count // 2 + 4 * 64, count // 2 + 4 * 64]
    assert size("int8", 4, 32, 96) == 4 * 32 * 96 + 4 * 96 and size("int4", 5, 13, 11) == (5 * 13 * 11 + 1) // 2 + 4 * 11
    assert size("int4", 101) == 51 + 4 and size("int8", 16, 10, dtype=torch.bfloat16) == 160 + 40
    assert list(CODECS) == list(get_args(CodecName))


@pytest.mark.parametrize("backward", STATELESS)
@pytest.mark.parametrize("forward", STATELESS)
def test_parts_of_a_message(forward: str, backward: str) -> None:
    """Labels and losses are exact, whatever their type; a reconstruction travels as the activation that it is."""
    y, g = torch.randn(8, 16), torch.randn(8, 16)
    up = Message(3, ((y, y > 0), torch.randn(50, 60)))
    down = Message(3, ((None, g, g), (y,), torch.tensor(0.123456789)))
    for channel, message in (("forward", up), ("backward", down)):
        codecs = codecs_of(channel, forward, backward)
        packed = pack(message, codecs, (1, 0))
        came = Packed.arrived(packed.buffer, codecs_of(channel, forward, backward), CPU).opened()
        if channel == "forward":
            assert torch.equal(came.parts[0][0], there_and_back(CODECS[forward], y)) and torch.equal(came.parts[0][1], y > 0)
            assert torch.equal(came.parts[1], message.parts[1])
            payload = [CODECS[forward].nbytes(y.shape, y.dtype), 128, 12000]
        else:
            chance = CODECS[backward].by_chance()
            for position, part in enumerate(came.parts[0][1:]):  # each draws for itself
                assert torch.equal(part, there_and_back(chance, g, (1, 0, 3, position)))
            assert torch.equal(came.parts[1][0], there_and_back(CODECS[forward], y)) and came.parts[0][0] is None
            assert torch.equal(came.parts[2], message.parts[2])
            payload = [CODECS[backward].nbytes(g.shape, g.dtype)] * 2 + [CODECS[forward].nbytes(y.shape, y.dtype), 4]
        assert packed.nbytes == wire.HEADER_BYTES + sum(math.ceil(nbytes / 64) * 64 for nbytes in payload)
    others = ("evaluation", "beside forward", "beside backward")
    assert not any(codecs_of(channel, forward, backward).parts for channel in others)


@pytest.mark.parametrize("name", SCALED)
def test_a_second_time_changes_nothing(name: str) -> None:
    """An activation that went up comes down again as a reconstruction: its numbers are codes already."""
    y = torch.randn(16, 32, 4, 4, generator=torch.Generator().manual_seed(5))
    once = there_and_back(CODECS[name], y)
    torch.testing.assert_close(there_and_back(CODECS[name], once), once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chance", [False, True])
@pytest.mark.parametrize("name", SCALED)
def test_no_loop_over_channels(name: str, chance: bool) -> None:
    """Sixteen times the channels are no operation more."""
    codec = CODECS[name].by_chance() if chance else CODECS[name]

    def operations(count: int) -> int:
        x = torch.randn(4, count, 4, 4)
        there_and_back(codec, x)  # what is made once
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as seen:
            there_and_back(codec, x)
        return sum(event.name.startswith("aten::") for event in seen.events() or ())

    assert 0 < operations(64) == operations(1024)


def test_the_page_tells_of_every_codec() -> None:
    """With the bytes of its example."""
    page = (Path(__file__).parent.parent / "docs" / "links.md").read_text()
    assert re.findall(r'^\| `"([\w-]+)"`', page, re.MULTILINE) == list(CODECS)
    sizes = dict.fromkeys(CODECS[name].nbytes((16, 64, 8, 8), torch.float32) for name in STATELESS)
    [told] = re.findall(r"8 × 8, in\nbytes: (.*)\.", page)
    assert [int(number.replace(",", "")) for number in re.findall(r"[\d,]+\d\d\d", told)] == list(sizes)
