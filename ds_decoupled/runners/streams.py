"""Streams of a device for passes that run at the same time; on a CPU there are none, and nothing is to be ordered."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


class Streams:
    """A stream for each micro-batch in flight, and the order of a stage's updates.

    A backward pass runs on the streams of its forward pass, so that micro-batches on one stream would wait for one another.

    Args:
        device: where tensors live.
        stages: whose updates are ordered.
    """

    def __init__(self, device: torch.device, stages: Iterable[int]) -> None:
        self.device, self._cuda = device, device.type == "cuda"
        self._lock = threading.Lock()
        self._all: list[Any] = []
        self._free: list[Any] = []
        self._of: dict[int, Any] = {}
        self._last: dict[int, Any] = dict.fromkeys(stages)  # events behind the last update of each

    def thread(self) -> None:
        """To be called in each thread."""
        if self._cuda:
            torch.cuda.set_device(self.device)

    def begin(self, micro_batch: int) -> None:
        """A stream for ``micro_batch``, behind what the calling thread has ordered so far: its data."""
        if not self._cuda:
            return
        with self._lock:
            if not self._free:
                self._free.append(torch.cuda.Stream(self.device))
                self._all.append(self._free[-1])
            stream = self._of[micro_batch] = self._free.pop()
        stream.wait_stream(torch.cuda.current_stream(self.device))

    def of(self, micro_batch: int) -> AbstractContextManager[Any]:
        """Within, the calling thread works on the stream of ``micro_batch``."""
        return torch.cuda.stream(self._of[micro_batch]) if self._cuda else nullcontext()

    def end(self, micro_batch: int) -> None:
        """Its stream may be another's."""
        if self._cuda:
            with self._lock:
                self._free.append(self._of.pop(micro_batch))

    @contextmanager
    def turn(self, stage: int) -> Iterator[None]:
        """Within, the device is done with the stage's last update. For one thread at a time."""
        if not self._cuda:
            yield
            return
        stream = torch.cuda.current_stream(self.device)
        if self._last[stage] is not None:
            stream.wait_event(self._last[stage])
        yield
        self._last[stage] = stream.record_event()

    def join(self) -> None:
        """What the calling thread orders from here on comes behind all of it."""
        for stream in self._all:
            torch.cuda.current_stream(self.device).wait_stream(stream)
