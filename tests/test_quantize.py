"""The vector quantizer against a slow loop that is written from its equations; packing of numbers of a few bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_decoupled.links.packing import bits_of, pack, packed_bytes, unpack
from ds_decoupled.nn import quantize
from ds_decoupled.nn.quantize import VectorQuantizer, decode, encode, from_vectors, to_vectors

SHAPES = [(4, 6, 5, 7), (3, 12, 1, 1), (9, 6), (2, 5, 12), (1, 6, 3, 3)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors_by_hand(x: Tensor, group: int) -> list[list[list[float]]]:
    """By group, every sample's every position in order: D consecutive channels there."""
    by_position = x.movedim(1, -1) if x.dim() == 4 else x
    flat = by_position.reshape(-1, by_position.shape[-1])
    return [[row[start:start + group].tolist() for row in flat] for start in range(0, flat.shape[1], group)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_channels_as_vectors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=seeded(0)).to(dtype)
    for group in (1, 2, 3, 6):
        vectors = to_vectors(x, group)
        assert vectors.dtype == torch.float32 and vectors.is_contiguous()
        assert vectors.tolist() == vectors_by_hand(x.float(), group)
        assert torch.equal(from_vectors(vectors, shape).to(dtype), x)
    assert torch.equal(to_vectors(x.mT.contiguous().mT, 3), to_vectors(x, 3))


def nearest_by_hand(vector: Tensor, codes: Tensor) -> int:
    """The first of the least distances."""
    distances = [math.fsum((a - b) ** 2 for a, b in zip(vector.tolist(), code.tolist())) for code in codes]
    return distances.index(min(distances))


@pytest.mark.parametrize(("codes", "count"), [(2, 700), (16, 600), (100, 300), (700, 40)])
def test_nearest(codes: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of which the last is not full."""
    monkeypatch.setattr(quantize, "BLOCK", 2048)
    monkeypatch.setattr(quantize, "BLOCK_AT_LEAST", 17)
    vectors = torch.randn(2, count, 3, generator=seeded(1)) + 5  # far from the origin, where products lose digits
    codebook = torch.randn(2, codes, 3, generator=seeded(2)) + 5
    found = encode(vectors, codebook[None])[0]
    for g in range(2):
        distances = (vectors[g].double()[:, None] - codebook[g].double()).square().sum(-1)
        chosen = distances.gather(1, found[g][:, None])[:, 0]
        assert (chosen <= distances.amin(1) + 1e-5).all()
        same = [nearest_by_hand(vectors[g, i], codebook[g]) == found[g, i] for i in range(40)]
        assert sum(same) >= 39  # but for two codes as near as rounding


def test_memory_is_bounded() -> None:
    """Never a score for every vector and code."""
    vectors, codebook = torch.randn(2, 20_000, 2), torch.randn(2, 64, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        encode(vectors, codebook[None])
    largest = max(event.cpu_memory_usage for event in seen.events() or ())
    assert 0 < largest <= 8 * 2 * 20_000 < 4 * 2 * 20_000 * 64  # the result's int64 numbers


class ByHand:
    """One codebook per group and level, number by number. Draws are the module's: the order of draws is part of the definition
    (start, which vectors, what dead codes become)."""

    def __init__(self, groups: int, group: int, codes: int, levels: int, decay: float, revive: bool) -> None:
        self.codes, self.decay, self.revive = codes, decay, revive
        self.c = torch.zeros(levels, groups, codes, group, dtype=torch.float64)
        self.n = torch.zeros(levels, groups, codes, dtype=torch.float64)
        self.m = self.c.clone()
        self.started = False

    def residual(self, v: Tensor, g: int, levels: int) -> Tensor:
        for level in range(levels):
            v = v - self.c[level, g, nearest_by_hand(v, self.c[level, g])]
        return v

    def learn(self, vectors: Tensor, generator: torch.Generator) -> None:
        vectors = vectors.double()
        levels, groups = self.c.shape[:2]
        if not self.started:
            for level in range(levels):
                order = torch.randperm(vectors.shape[1], generator=generator)[:self.codes].tolist()
                for g in range(groups):
                    for k, i in enumerate(order):
                        self.c[level, g, k] = self.residual(vectors[g, i], g, level)
            self.n[:], self.m[:], self.started = 1, self.c, True
        enough = max(quantize.LEARNED_AT_LEAST, quantize.LEARNED_A_CODE * self.codes)
        if vectors.shape[1] > enough:
            vectors = vectors[:, torch.randint(vectors.shape[1], (enough,), generator=generator)]
        before = self.c.clone()
        left = vectors.clone()
        for level in range(levels):
            rest = left.clone()
            added, taken = torch.zeros_like(self.m[level]), torch.zeros_like(self.n[level])
            for g in range(groups):
                for i, v in enumerate(left[g]):
                    k = nearest_by_hand(v, before[level, g])
                    added[g, k] += v
                    taken[g, k] += 1
                    rest[g, i] = v - before[level, g, k]
            self.n[level] = self.decay * self.n[level] + (1 - self.decay) * taken
            self.m[level] = self.decay * self.m[level] + (1 - self.decay) * added
            if self.revive:
                drawn = torch.randint(vectors.shape[1], (groups, self.codes), generator=generator)
                for g in range(groups):
                    share = self.n[level, g].mean() * quantize.DEAD
                    for k in [k for k in range(self.codes) if self.n[level, g, k] < share]:
                        self.n[level, g, k], self.m[level, g, k] = 1.0, left[g, drawn[g, k]]
            for g in range(groups):
                total = self.n[level, g].sum()
                for k in range(self.codes):
                    smooth = (self.n[level, g, k] + 1e-5) / (total + self.codes * 1e-5) * total
                    self.c[level, g, k] = self.m[level, g, k] / smooth
            left = rest


@pytest.mark.parametrize(("levels", "decay", "revive"), [(1, 0.99, True), (1, 0.5, True), (1, 0.5, False), (3, 0.7, True)])
def test_learning_is_the_definition(levels: int, decay: float, revive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over batches whose vectors move, so that codes die; the draws are the same, all else is counted by hand."""
    monkeypatch.setattr(quantize, "LEARNED_AT_LEAST", 40)
    ours, theirs = VectorQuantizer(2, 3, 8, levels, decay, revive), ByHand(2, 3, 8, levels, decay, revive)
    revived = 0
    for batch in range(12):
        vectors = torch.randn(2, 60 if batch else 50, 3, generator=seeded(batch)) * 0.5
        vectors[:, ::2] += 0.6 * batch
        before = theirs.n.clone()
        ours.learn(vectors, seeded(100 + batch))
        theirs.learn(vectors, seeded(100 + batch))
        revived += int(((theirs.n == 1) & (before != 1)).sum())
        torch.testing.assert_close(ours.codebooks.double(), theirs.c, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.counts.double(), theirs.n, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.sums.double(), theirs.m, rtol=1e-4, atol=1e-4)
    assert revived > 0 or not revive, "no code died"
    v = torch.randn(2, 20, 3, generator=seeded(50)) + 6
    came = decode(encode(v, ours.codebooks), ours.codebooks)
    for g in range(2):
        for i in range(20):
            torch.testing.assert_close((v[g, i] - came[g, i]).double(), theirs.residual(v[g, i].double(), g, levels),
                                       rtol=1e-3, atol=1e-3)


def test_dead_codes_are_revived() -> None:
    """Eight clusters, far from where the first batch was, so that one or two codes serve all of them and the others none."""
    centres = torch.randn(1, 8, 4, generator=seeded(0)) * 10
    vectors = (centres[:, :, None] + 0.01 * torch.randn(1, 8, 50, 4, generator=seeded(1))).flatten(1, 2)
    errors = {}
    for revive in (False, True):
        quantizer = VectorQuantizer(1, 4, 40, decay=0.9, revive=revive)
        quantizer.learn(200 + torch.randn(1, 50, 4, generator=seeded(2)), seeded(2))
        for batch in range(150):
            quantizer.learn(vectors, seeded(batch))
        came = decode(encode(vectors, quantizer.codebooks), quantizer.codebooks)
        errors[revive] = float((came - vectors).square().mean().sqrt())
    assert errors[True] < 0.05 and errors[False] > 1, errors


def test_levels_refine() -> None:
    vectors = torch.randn(2, 900, 4, generator=seeded(0))
    errors = []
    for levels in (1, 2, 3):
        quantizer = VectorQuantizer(2, 4, 16, levels, decay=0.9)
        for batch in range(60):
            quantizer.learn(vectors, seeded(batch))
        errors.append(float((decode(encode(vectors, quantizer.codebooks), quantizer.codebooks) - vectors).norm()))
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.8 * errors[1], errors


def test_draws_are_the_generators_alone() -> None:
    def learned(seed: int) -> dict[str, Any]:
        quantizer = VectorQuantizer(2, 2, 16)
        for batch in range(3):
            quantizer.learn(torch.randn(2, 3000, 2, generator=seeded(batch)), seeded(seed + batch))
        return quantizer.state_dict()

    state = torch.get_rng_state()
    one = learned(0)
    torch.randn(3)
    torch.set_rng_state(state)
    again, other = learned(0), learned(1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one["codebooks"], again["codebooks"]) and not torch.equal(one["codebooks"], other["codebooks"])
    resumed = VectorQuantizer(2, 2, 16)
    resumed.load_state_dict(one)
    whole = VectorQuantizer(2, 2, 16)
    whole.load_state_dict(again)
    for quantizer in (resumed, whole):
        quantizer.learn(torch.randn(2, 3000, 2, generator=seeded(9)), seeded(9))
    assert torch.equal(resumed.codebooks, whole.codebooks)
    assert whole.moved_from(whole.codebooks) == 0 and whole.moved_from(2 * whole.codebooks) == pytest.approx(0.5)
    assert whole.moved_from(torch.zeros_like(whole.codebooks)) == math.inf


def test_fewer_vectors_than_codes() -> None:
    with pytest.raises(ValueError, match="codebook of 16 cannot begin with 15"):
        VectorQuantizer(1, 2, 16).learn(torch.randn(1, 15, 2), seeded(0))


# Packing


def bits_by_hand(count: int) -> int:
    return next(bits for bits in range(1, 20) if 2**bits >= count)


def test_packing_is_exact_for_every_codebook() -> None:
    """From 2 to 65536: the first and the last index, the one in the middle, and their neighbours."""
    for codes in range(2, 65537):
        bits = bits_of(codes)
        assert bits == bits_by_hand(codes)
        if codes & (codes - 1) and codes % 97:  # every power of two and every so many others
            continue
        numbers = torch.tensor([0, codes - 1, codes // 2, 1, codes // 2 - 1, codes - 2, 0, codes - 1, codes // 3])
        assert unpack(pack(numbers, bits), 9, bits).tolist() == numbers.tolist(), codes


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_of_every_count(bits: int) -> None:
    for count in (*range(19), 255, 1000):
        numbers = torch.randint(0, 2**bits, (count,), generator=seeded(count))
        packed = pack(numbers, bits)
        assert packed.dtype == torch.uint8 and packed.numel() == packed_bytes(count, bits)
        assert count * bits / 8 <= packed.numel() < count * bits / 8 + 4  # a part of a byte for each piece
        assert torch.equal(unpack(packed, count, bits).long(), numbers)
    assert packed_bytes(800, bits) == 100 * bits
