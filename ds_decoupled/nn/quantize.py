"""Online vector quantization: a tensor's channels as vectors, each replaced by the nearest of a codebook that learns.

Channels are split into G groups of D, and every group has a codebook of K vectors of its own::

    x  (N, C, H, W) or (..., C)   -->   vectors  (G, N H W, D)   -->   indices  (G, N H W) of 0 ... K-1

    k(v)  = argmin_k |v - c_k|^2  = argmax_k  v c_k - |c_k|^2 / 2                       the nearest
    N_k  <- g N_k + (1 - g) n_k           m_k <- g m_k + (1 - g) sum of the v with k(v) = k    the batch's n_k vectors of code k
    c_k   = m_k / N'_k                    N'_k = (N_k + e) / (sum N + K e) * sum N             counts smoothed as Laplace did

This is the exponential-average update of VQ-VAE (arXiv 1711.00937, appendix A.1). A code is dead where N_k is below
:data:`DEAD` of the mean; it starts again as a vector of the batch (as in Jukebox, arXiv 2005.00341, section 3.1). With residual
levels (residual vector quantization; SoundStream, arXiv 2107.03312, section III.C) level i quantizes what levels 0 ... i-1 have
left over, and the sum of the levels' vectors stands for v.

What chance draws (the first codebook, which vectors are learned from, what dead codes become) comes from the generator that is
passed in and from nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Scores, of codes times vectors, that are in memory at once: they should stay in a core's cache. With large codebooks it is
#: the second number of vectors.
BLOCK, BLOCK_AT_LEAST = 2**16, 512
#: Vectors of each group that are learned from in a batch: so many a code, and never fewer than the second number.
LEARNED_A_CODE, LEARNED_AT_LEAST = 4, 1024
#: A code that serves less than this part of its share of the vectors is dead.
DEAD = 0.05
#: What is added to every count.
EPSILON = 1e-5


def to_vectors(x: Tensor, group: int) -> Tensor:
    """The vectors (G, n, D) float32 of ``x``, whose C channels are G groups of D = ``group``; in one piece."""
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    if x.dim() == 4:
        apart = x.reshape(x.shape[0], channels // group, group, -1).permute(1, 0, 3, 2)
    else:
        apart = x.reshape(-1, channels // group, group).transpose(0, 1)
    vectors = torch.empty(apart.shape, dtype=torch.float32, device=x.device).copy_(apart)
    return vectors.view(channels // group, -1, group)


def from_vectors(vectors: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_vectors`: a float32 tensor of ``shape``."""
    groups, _, group = vectors.shape
    if len(shape) == 4:
        apart = vectors.view(groups, shape[0], -1, group).permute(1, 0, 3, 2)
    else:
        apart = vectors.transpose(0, 1)
    return apart.reshape(tuple(shape))


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code of every vector.

    Args:
        vectors: (n, D).
        codebook: (K, D).

    Returns:
        Indices (n,) int64. Where two codes are as near, either.
    """
    codes, count = codebook.shape[0], vectors.shape[0]
    found = torch.empty(count, dtype=torch.int64, device=vectors.device)
    columns = min(count, max(BLOCK_AT_LEAST, BLOCK // codes))
    bias = codebook.square().sum(-1, keepdim=True).mul_(-0.5)
    scores = vectors.new_empty(codes, columns)
    for start in range(0, count, columns):
        part = vectors[start:start + columns].mT
        of_part = scores if part.shape[1] == columns else vectors.new_empty(codes, part.shape[1])
        found[start:start + columns] = largest(torch.addmm(bias, codebook, part, out=of_part))
    return found


def largest(scores: Tensor) -> Tensor:
    """The row (n,) int64 in which each column of ``scores`` (K, n) is largest."""
    if scores.device.type != "cpu":
        return scores.argmax(0)
    # On the CPU max_pool2d over an image of K rows and n channels, channels last, is the only one of torch's operations that
    # finds places with vector instructions: a tenth of argmax's time.
    image = scores.view(1, scores.shape[0], 1, scores.shape[1]).permute(0, 3, 1, 2)
    return F.max_pool2d(image, (scores.shape[0], 1), return_indices=True)[1].view(-1)


def encode(vectors: Tensor, codebooks: Tensor) -> Tensor:
    """Indices (L, G, n) int64 of ``vectors`` (G, n, D) by the codebooks (L, G, K, D) of L residual levels."""
    indices = torch.empty(codebooks.shape[0], *vectors.shape[:2], dtype=torch.int64, device=vectors.device)
    # Group by group: what is left over is small then, and is not asked of the system anew each time.
    for g, left in enumerate(vectors):
        for level, codebook in enumerate(codebooks[:, g]):
            indices[level, g] = nearest(left, codebook)
            if level + 1 < len(codebooks):
                left = left - codebook.index_select(0, indices[level, g])
    return indices


def decode(indices: Tensor, codebooks: Tensor) -> Tensor:
    """The vectors (G, n, D) that ``indices`` (L, G, n), of any whole type, stand for: the sum over levels, in their order."""
    vectors = codebooks.new_empty(*indices.shape[1:], codebooks.shape[-1])
    for g, made in enumerate(vectors):
        for level, codebook in enumerate(codebooks[:, g]):
            codes = codebook.index_select(0, indices[level, g].long())
            made.add_(codes) if level else made.copy_(codes)
    return vectors


class VectorQuantizer:
    """The codebooks of one stream of tensors, which learn from it.

    Args:
        groups: G.
        group: D, the numbers of a vector.
        codebook: K, the vectors of a group's codebook.
        levels: L; 1 is plain.
        decay: g, the part of the averages that a batch leaves as it was.
        revive: whether dead codes start again.
        device: where the vectors are.

    Attributes:
        codebooks: (L, G, K, D) float32; zeros until the first batch.
        counts: N (L, G, K), averages over batches of the vectors that were learned from.
        sums: m (L, G, K, D).
        started: whether a batch was seen.
    """

    def __init__(self, groups: int, group: int, codebook: int, levels: int = 1, decay: float = 0.99, revive: bool = True,
                 device: torch.device | str = "cpu") -> None:
        self.decay, self.revive = decay, revive
        self.codebooks = torch.zeros(levels, groups, codebook, group, device=device)
        self.counts = torch.zeros(levels, groups, codebook, device=device)
        self.sums = torch.zeros_like(self.codebooks)
        self.started = False

    def learn(self, vectors: Tensor, generator: torch.Generator) -> None:
        """Take in one batch.

        Args:
            vectors: (G, n, D) float32, all finite; of the first batch at least K a group.
            generator: on the CPU, so that every device draws the same.

        Raises:
            ValueError: if the first batch has fewer vectors than a codebook.
        """
        if not self.started:
            self._start(vectors, generator)
        left = self._some(vectors, generator)
        # By the codebooks that the batch found, which are replaced below.
        indices, before = encode(left, self.codebooks), self.codebooks.clone()
        for level, index in enumerate(indices):
            self._update(level, left, index, generator)
            left = left - decode(index[None], before[level:level + 1])

    def _start(self, vectors: Tensor, generator: torch.Generator) -> None:
        """Every code is a vector of the batch, and counts as that one vector."""
        codes = self.codebooks.shape[2]
        if vectors.shape[1] < codes:
            raise ValueError(f"a codebook of {codes} cannot begin with {vectors.shape[1]} vectors")
        for level, codebook in enumerate(self.codebooks):
            # Each level from other vectors: those that became codes of the level below have left nothing.
            chosen = vectors[:, torch.randperm(vectors.shape[1], generator=generator)[:codes].to(vectors.device)]
            below = self.codebooks[:level]
            codebook.copy_(chosen - decode(encode(chosen, below), below) if level else chosen)
        self.counts.fill_(1.0)
        self.sums.copy_(self.codebooks)
        self.started = True

    def _some(self, vectors: Tensor, generator: torch.Generator) -> Tensor:
        """What is learned from: all vectors, or as many as are enough, drawn with replacement."""
        enough = max(LEARNED_AT_LEAST, LEARNED_A_CODE * self.codebooks.shape[2])
        if vectors.shape[1] <= enough:
            return vectors
        return vectors[:, torch.randint(vectors.shape[1], (enough,), generator=generator).to(vectors.device)]

    def _update(self, level: int, vectors: Tensor, index: Tensor, generator: torch.Generator) -> None:
        """One level's averages and codes, after ``vectors`` went to ``index``."""
        counts, sums, codebook = self.counts[level], self.sums[level], self.codebooks[level]
        groups, codes, _ = codebook.shape
        # Indices into the codes of all groups, one group's after the other's.
        flat = (index + torch.arange(groups, device=index.device)[:, None] * codes).view(-1)
        # index_put_ adds up in the same order every time, on every device.
        added = torch.zeros_like(sums).flatten(0, 1).index_put_((flat,), vectors.flatten(0, 1), accumulate=True)
        taken = torch.bincount(flat, minlength=groups * codes).to(counts.dtype)
        counts.mul_(self.decay).add_(taken.view_as(counts), alpha=1 - self.decay)
        sums.mul_(self.decay).add_(added.view_as(sums), alpha=1 - self.decay)
        if self.revive:
            dead = counts < DEAD * counts.mean(1, keepdim=True)
            drawn = torch.randint(vectors.shape[1], (groups, codes), generator=generator).to(vectors.device)
            fresh = vectors.gather(1, drawn[..., None].expand(-1, -1, vectors.shape[2]))
            counts.masked_fill_(dead, 1.0)
            sums.copy_(fresh.where(dead[..., None], sums))
        total = counts.sum(1, keepdim=True)
        smooth = (counts + EPSILON) / (total + codes * EPSILON) * total
        torch.div(sums, smooth[..., None], out=codebook)

    def moved_from(self, codebooks: Tensor) -> float:
        """How far the codebooks are from ``codebooks``, as a part of these: 0.1 is a tenth of their length."""
        length = float(codebooks.norm())
        distance = float((self.codebooks - codebooks).norm())
        return distance / length if length else math.inf if distance else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What is learned so far."""
        return {"codebooks": self.codebooks.clone(), "counts": self.counts.clone(), "sums": self.sums.clone(),
                "started": self.started}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        for name in ("codebooks", "counts", "sums"):
            getattr(self, name).copy_(state[name])
        self.started = state["started"]
