"""``"vq"`` on a link: what travels, when codebooks travel along, which of them reads what, and what is refused."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_decoupled.errors import ConfigError, LinkError
from ds_decoupled.links import Codecs, LocalLink, Message, Packed, Writer, codecs_of, pack
from ds_decoupled.links.message import HEADER_BYTES
from ds_decoupled.links.packing import unpack
from ds_decoupled.links.vector import VectorCodec

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"group": 4, "codebook": 16}


def stream(count: int, shape: tuple[int, ...] = (6, 8, 3, 3), drift: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) + drift * i for i in range(count)]


class Wire:
    """A sender's codecs and a receiver's."""

    def __init__(self, codec: VectorCodec) -> None:
        self.sender, self.receiver = Codecs(codec), Codecs(codec)
        self.number = 0

    def send(self, *parts: Any) -> Packed:
        """What the receiver makes of the next message."""
        packed = pack(Message(self.number, parts), self.sender, (1, 0, 0, 0))
        self.number += 1
        return Packed.arrived(packed.buffer.clone(), self.receiver, CPU)


def payload(packed: Packed, part: int = 0) -> Tensor:
    place = packed.layout.parts[part]
    return packed.buffer[place.start:place.stop]


def by_hand(raw: Tensor, x: Tensor, codec: VectorCodec, known: dict[int, Tensor]) -> Tensor:
    """What the bytes of a tensor stand for, read as docs/links.md says; codebooks that ride along are added to ``known``."""
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    groups, positions = channels // codec.group, x.numel() // channels
    bits = (codec.codebook - 1).bit_length()
    version = int(raw[:8].view(torch.int64))
    flags, at = raw[8:8 + groups], 8 + math.ceil(groups / 8) * 8
    count = codec.levels * groups * positions
    indices = unpack(raw[at:at + math.ceil(count * bits / 8)], count, bits).view(codec.levels, groups, positions)
    at += math.ceil(math.ceil(count * bits / 8) / 8) * 8
    if raw.numel() > at:
        known[version] = raw[at:].clone().view(torch.float32).view(codec.levels, groups, codec.codebook, codec.group)
    made = torch.zeros(positions, channels)
    for g in range(groups):
        for i in range(positions):
            value = sum(known[version][level, g, int(indices[level, g, i])] for level in range(codec.levels))
            made[i, g * codec.group:(g + 1) * codec.group] = value if flags[g] else math.nan
    if x.dim() == 4:
        return made.view(x.shape[0], *x.shape[2:], channels).movedim(-1, 1)
    return made.view(x.shape)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("shape", [(6, 8, 3, 3), (40, 12), (5, 7, 8)])
def test_the_wire_against_the_page(shape: tuple[int, ...], levels: int) -> None:
    codec = VectorCodec(**SMALL, levels=levels, every=4, moved=math.inf)
    wire, known = Wire(codec), dict[int, Tensor]()
    for x in stream(9, shape):
        came = wire.send(x)
        assert torch.equal(came.opened().parts[0], by_hand(payload(came), x, codec, known))
        if levels == 1:  # every vector by the nearest of its codes
            raw, groups = x.movedim(1, -1) if x.dim() == 4 else x, shape[1 if len(shape) == 4 else -1] // 4
            vectors = raw.reshape(-1, groups, 4)
            codes = known[max(known)][0]
            nearest = torch.stack([(vectors[:, g, None] - codes[g]).norm(dim=-1).amin(1) for g in range(groups)], 1)
            made = came.opened().parts[0]
            error = ((made.movedim(1, -1) if x.dim() == 4 else made).reshape(-1, groups, 4) - vectors).norm(dim=-1)
            torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-4)
    assert sorted(known) == [0, 1, 2]


@pytest.mark.parametrize(("codebook", "group", "levels"), [(16, 4, 1), (256, 8, 1), (100, 2, 2), (3, 8, 1), (512, 4, 1)])
def test_bytes_against_a_count(codebook: int, group: int, levels: int) -> None:
    """Indices, version and flags in every message; codebooks in the first and after every third."""
    shape = (8, 16, 9, 9)
    wire = Wire(VectorCodec(group, codebook, levels, every=3, moved=math.inf))
    sizes = [wire.send(x, torch.arange(8)).nbytes for x in stream(7, shape)]
    groups, positions = 16 // group, 8 * 81
    bits = math.ceil(math.log2(codebook))
    indices = math.ceil(levels * groups * positions * bits / 8)
    assert levels * groups * positions % 8 == 0  # no piece of a byte is lost
    every = 8 + math.ceil(groups / 8) * 8 + math.ceil(indices / 8) * 8
    books = levels * groups * codebook * group * 4
    aligned = lambda nbytes: math.ceil(nbytes / 64) * 64  # noqa: E731
    plain, full = (HEADER_BYTES + aligned(nbytes) + 64 for nbytes in (every, every + books))
    assert sizes == [full, plain, plain, full, plain, plain, full]
    assert wire.receiver.at(0, 0).nbytes(shape, torch.float32) == every
    # What the compression is without what is around: 32 D / (L log2 K), if K fills its bits.
    assert 4 * 8 * 16 * 81 / indices == pytest.approx(32 * group / (levels * bits))


def test_codebooks_that_moved_are_sent() -> None:
    """As soon as they are far from what the receiver has; else only after a while."""
    def versions(moved: float, drift: float, decay: float = 0.5) -> list[int]:
        wire = Wire(VectorCodec(**SMALL, decay=decay, every=1000, moved=moved))
        return [wire.send(x).readers[0].version for x in stream(10, drift=drift)]  # type: ignore[attr-defined]

    assert 0 < versions(0.1, 0.0, decay=0.95)[-1] < 9 and versions(0.1, 0.5) == list(range(10))
    assert versions(10.0, 0.5) == [0] * 10


def test_a_record_is_read_by_its_own_codebooks() -> None:
    """However many versions have come since; and it keeps no other alive."""
    wire = Wire(VectorCodec(**SMALL, decay=0.5, every=1))
    codec = VectorCodec(**SMALL)
    data, known = stream(12, drift=0.3), dict[int, Tensor]()
    records = [wire.send(x, torch.tensor([i])) for i, x in enumerate(data)]
    expected = [by_hand(payload(record), x, codec, known) for record, x in zip(records, data)]
    assert [record.readers[0].version for record in records] == list(range(12))  # type: ignore[attr-defined]
    for i in (0, 11, 1, 0):
        record = records[i]
        message = record.opened()
        assert torch.equal(message.parts[0], expected[i]) and message.parts[1].tolist() == [i]
        assert record.micro_batch == message.micro_batch == i
        message.parts[1].fill_(77)  # what is made of a record does not change it
        message.parts[0].zero_()
    assert not torch.equal(expected[0], expected[1])
    assert all(record.nbytes == record.buffer.numel() > 0 for record in records)


def test_records_can_be_saved() -> None:
    """With their codebooks, each of them once."""
    wire = Wire(VectorCodec(**SMALL, every=6, moved=math.inf))
    records = [wire.send((x, -x), torch.arange(6)) for x in stream(12)]
    assert len({id(reader) for record in records for reader in record.readers[:2]}) == 4  # two streams, two versions
    file = io.BytesIO()
    torch.save(records, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for a, b in zip(records, loaded):
        assert a.micro_batch == b.micro_batch and a.nbytes == b.nbytes
        assert all(map(torch.equal, a.opened().parts[0], b.opened().parts[0]))
    assert len({id(reader) for record in loaded for reader in record.readers[:2]}) == 4


def test_two_streams_learn_apart() -> None:
    wire = Wire(VectorCodec(**SMALL, every=5, moved=math.inf))
    for x in stream(3):
        came = wire.send((x, None, 100 + x), torch.arange(6)).opened().parts
        assert came[0][1] is None and came[1].tolist() == list(range(6))
        assert (came[0][0] - x).abs().max() < 6 and (came[0][2] - 100 - x).abs().max() < 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats(dtype: torch.dtype) -> None:
    """By way of float32."""
    codec = VectorCodec(**SMALL)
    one, two = Wire(codec), Wire(codec)
    for x in stream(3):
        rounded = x.to(dtype)
        came = one.send(rounded).opened().parts[0]
        assert came.dtype == dtype and torch.equal(came, two.send(rounded.float()).opened().parts[0].to(dtype))


@pytest.mark.parametrize("x", [torch.arange(640).view(10, 64), torch.randn(2, 3) > 0, torch.randn(7, 9), torch.tensor(1.5),
                               torch.randn(64), torch.randn(2, 3, 4, 5, 6), torch.randn(0, 8), torch.randn(9, 9).cfloat(),
                               torch.randn(20, 20).to(torch.float8_e4m3fn)], ids=lambda x: f"{x.dtype}-{tuple(x.shape)}")
def test_what_travels_as_it_is(x: Tensor) -> None:
    wire = Wire(VectorCodec(codebook=8))
    for _ in range(2):
        packed = wire.send(x)
        [came] = packed.opened().parts
        assert came.dtype == x.dtype and came.shape == x.shape and payload(packed).numel() == x.nbytes
        assert torch.equal(came.reshape(-1).view(torch.uint8), x.reshape(-1).view(torch.uint8))
    assert not wire.sender.state_dict()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_as_nan(wrong: float) -> None:
    """In its group of channels; the others do not suffer, and nothing is learned from it. Also before anything was learned."""
    for first in (0, 2):
        wire, clean = Wire(VectorCodec(**SMALL)), Wire(VectorCodec(**SMALL))
        data = stream(4)
        for i, x in enumerate(data):
            if i == first:
                spoilt = x.clone()
                spoilt[1, 5, 0, 2] = wrong
                came = wire.send(spoilt).opened().parts[0]
                assert came[:, 4:].isnan().all() and bool(came[:, :4].isfinite().all()) == (first > 0)
                clean.number += 1
            else:
                assert torch.equal(wire.send(x).opened().parts[0], clean.send(x).opened().parts[0])


def test_the_rest_of_the_run_is_the_same() -> None:
    """A sender that was saved and another receiver: the same numbers, after the codebooks were sent once more."""
    codec = VectorCodec(**SMALL, every=4, decay=0.8)
    data = stream(12, drift=0.05)
    whole, stopped = Wire(codec), Wire(codec)
    expected = [whole.send((x, 2 * x)).opened().parts[0] for x in data]
    for x in data[:6]:
        stopped.send((x, 2 * x))
    file = io.BytesIO()
    torch.save(stopped.sender.state_dict(), file)
    file.seek(0)
    resumed = Wire(codec)
    resumed.number = 6
    resumed.sender.load_state_dict(torch.load(file, weights_only=False), CPU)
    resumed.receiver.load_state_dict({}, CPU)
    for x, wanted in zip(data[6:], expected[6:]):
        assert all(map(torch.equal, resumed.send((x, 2 * x)).opened().parts[0], wanted))
    assert expected[0][0].shape == data[0].shape


def test_draws_follow_from_the_key() -> None:
    def sent(seed: int) -> Tensor:
        state = torch.get_rng_state()
        packed = pack(Message(0, (stream(1)[0],)), Codecs(VectorCodec(**SMALL)), (seed,))
        assert torch.equal(state, torch.get_rng_state())
        return payload(packed)

    assert torch.equal(sent(1), sent(1)) and not torch.equal(sent(1), sent(2))


def test_a_coded_link_is_the_wire() -> None:
    """Between stages of one rank, the numbers that another rank would have read."""
    codec = VectorCodec(**SMALL)
    wire, link, plain = Wire(codec), LocalLink(Writer(Codecs(codec), lambda: (1, 0, 0, 0))), LocalLink()
    for i, x in enumerate(stream(4)):
        for queue in (link, plain):
            queue.send(Message(i, (x, torch.arange(6))))
        came, kept = link.recv(i, "stage 1"), plain.recv(i, "stage 1")
        assert torch.equal(came.parts[0], wire.send(x, torch.arange(6)).opened().parts[0])
        assert kept.parts[0] is x and kept.opened() is kept and kept.nbytes == x.nbytes + 48


def test_a_reconstruction_has_codebooks_of_its_own() -> None:
    """Down by the forward codec, beside a gradient by a scalar one."""
    codecs = codecs_of("backward", "vq", "int8", {"group": 4, "codebook": 16})
    x, g = stream(2)
    packed = pack(Message(0, (g, x, torch.tensor(0.5))), codecs, (1,))
    assert [type(reader).__name__ for reader in packed.readers] == ["Int8", "Codebooks", "Codec"]
    assert list(codecs.state_dict()) == [(1, 0)]
    assert not codecs_of("evaluation", "vq", "none").parts and codecs_of("forward", "vq", "none").parts[0].name == "vq"


def test_refusals() -> None:
    wire = Wire(VectorCodec(group=3, codebook=16))
    with pytest.raises(ConfigError, match=r'"decoupled.vq.group": 3.*\(6, 8, 3, 3\) has 8.*Take a divisor'):
        wire.send(stream(1)[0])
    with pytest.raises(ConfigError, match=r'"decoupled.vq.codebook": 64.*has 54 of each.*Take a smaller codebook'):
        Wire(VectorCodec(group=4, codebook=64)).send(stream(1)[0])
    wire = Wire(VectorCodec(**SMALL))
    first = wire.send(stream(1)[0])
    with pytest.raises(LinkError, match="8 channels before"):
        wire.send(torch.randn(40, 12))
    assert wire.send(stream(1)[0][:1]).nbytes < first.nbytes  # a last batch may be short
    late = pack(Message(1, (stream(1)[0],)), wire.sender)
    with pytest.raises(LinkError, match="version 0 of its codebooks, and here is none"):
        Packed.arrived(late.buffer, Codecs(VectorCodec(**SMALL)), CPU)
    with pytest.raises(ValueError, match="codebook 16 and group 4"):
        Codecs(VectorCodec(group=2, codebook=16)).load_state_dict(wire.sender.state_dict(), CPU)
