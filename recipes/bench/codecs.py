"""What codecs cost: bytes, error, and time to write and to read, beside the forward pass of the stage that sends."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ds_decoupled.links import CODECS, Codec, Codecs, Message, Packed, pack
from ds_decoupled.links.vector import VectorCodec
from ds_decoupled.models import build_model
from run.tables import table

#: Messages before anything is timed: a codebook has learned by then.
LEARN = 60
#: Different ones among them; another one is what the error is measured of.
BATCHES = 8

VECTORS: tuple[dict[str, Any], ...] = (
    {"group": 4, "codebook": 256}, {"group": 8, "codebook": 256}, {"group": 8, "codebook": 16},
    {"group": 8, "codebook": 16, "levels": 2}, {"group": 4, "codebook": 16, "levels": 2}, {"group": 16, "codebook": 256})
"""Settings of ``"vq"``; a group must divide the channels."""


def kinds(channels: int) -> dict[str, Codec]:
    """Every codec, and ``"vq"`` by several settings, by the name in the table."""
    found = {name: codec for name, codec in CODECS.items() if not isinstance(codec, VectorCodec)}
    for settings in VECTORS:
        if channels % settings["group"] == 0:
            named = f"vq, D={settings['group']}, K={settings['codebook']}"
            found[named + (f", L={settings['levels']}" if "levels" in settings else "")] = VectorCodec(**settings)
    return found


def codecs(name: str, width: int, image_size: int, micro_batch: int, repeats: int) -> tuple[str, list[dict[str, Any]]]:
    """Of what a stage gives, a residual block of two 3x3 convolutions: a table, and the numbers.

    All take turns, round by round, and medians over the rounds are told: noise of the machine hits all alike.
    """
    torch.manual_seed(0)
    block = build_model(name, data="cifar10", width=width)[1].build()
    conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    inputs = [torch.randn(micro_batch, width, image_size, image_size).relu() for _ in range(BATCHES)]
    with torch.no_grad():
        given: list[Tensor] = [block(each) for each in inputs]
        x, y = inputs[-1], given[-1]
        senders = {kind: _Sender(codec, given) for kind, codec in kinds(width).items()}
        works: dict[str, Callable[[], Any]] = {"stage": lambda: block(x), "convolution": lambda: conv(x)}
        for kind, sender in senders.items():
            works |= {f"{kind}: write": sender.write, f"{kind}: read": sender.read}
        times: dict[str, list[float]] = {kind: [] for kind in works}
        for _ in tqdm(range(repeats), unit="round"):
            for kind, work in works.items():
                times[kind].append(_seconds(work))
    stage, convolution = median(times["stage"]), median(times["convolution"])
    found: list[dict[str, Any]] = [{"stage_seconds": stage, "convolution_seconds": convolution}]
    rows = []
    for kind, sender in senders.items():
        write, read = median(times[f"{kind}: write"]), median(times[f"{kind}: read"])
        row = {"codec": kind, "bytes_per_sample": sender.bytes / micro_batch, "codebook_bytes": sender.codebook_bytes,
               "error": sender.error(), "write_seconds": write, "read_seconds": read}
        found.append(row)
        rows.append([kind, f"{row['bytes_per_sample']:,.0f}", f"{y.nbytes / sender.bytes:.1f}",
                     f"{sender.codebook_bytes / 1024:.0f}" if sender.codebook_bytes else "", f"{row['error']:.1e}",
                     f"{1e3 * write:.1f}", f"{1e3 * read:.1f}", f"{(write + read) / stage:.2f}",
                     f"{(write + read) / convolution:.2f}"])
    title = f"codec (stage: {1e3 * stage:.1f} ms, one convolution with norm and ReLU: {1e3 * convolution:.1f} ms)"
    return table([title, "bytes a sample", "shorter by", "codebooks, KiB", "relative error", "write, ms", "read, ms",
                  "both / stage", "both / convolution"], rows), found


class _Sender:
    """One codec that has learned from what a stage gave, and writes the last of it again and again.

    Attributes:
        bytes: of a message without codebooks, header not counted.
        codebook_bytes: of those that travel now and then.
    """

    def __init__(self, codec: Codec, given: list[Tensor]) -> None:
        self.y, self.codecs, self.number = given[0], Codecs(codec), 0
        own = self.codecs.at(0, 0)
        self.bytes = own.nbytes(self.y.shape, self.y.dtype)
        self.codebook_bytes = own.encode(self.y, (0,)).nbytes - self.bytes
        for i in range(LEARN if isinstance(own, VectorCodec) else 1):
            self.y = given[i % (len(given) - 1)]
            self.write()
        self.y = given[-1]
        self.packed: Packed = self.write()

    def write(self) -> Packed:
        self.number += 1
        return pack(Message(self.number, (self.y,)), self.codecs)

    def read(self) -> Tensor:
        [came] = self.packed.unwrapped().parts
        assert isinstance(came, Tensor)
        return came

    def error(self) -> float:
        """Squares of the errors over squares of the numbers."""
        return float((self.read() - self.y).square().sum() / self.y.square().sum())


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
