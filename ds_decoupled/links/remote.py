"""A link between two ranks: ``isend`` and ``irecv``, one flat buffer a message, receives posted ahead.

Each direction has a process group of its own, so that a message down never waits behind a message up. Where the backend
cannot move the device's tensors (gloo with CUDA) buffers are pinned host memory, so that several ranks can share a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_decoupled.errors import LinkError
from ds_decoupled.links import message as wire
from ds_decoupled.links.codec import Codec
from ds_decoupled.links.local import check
from ds_decoupled.links.message import HEADER_BYTES, Message


def buffer_device(group: Any, device: torch.device) -> torch.device:
    """Where messages of ``group`` are assembled: on the device, or in host memory if the backend cannot reach it."""
    return torch.device("cpu") if device.type != "cpu" and dist.get_backend(group) == "gloo" else device


def _new_buffer(nbytes: int, on: torch.device, device: torch.device) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=on, pin_memory=on.type == "cpu" and device.type == "cuda")


class RemoteSender:
    """Sends to one rank. A send does not wait, unless the queue is full; buffers are let go when their message has left.

    Args:
        peer: the receiver's global rank.
        group: the process group of this direction.
        device: where the tensors live.
        codec: how values are written.
        timeout: seconds that a send may wait for room in the queue.
        queue: messages that may be under way at once; None for any number.
    """

    def __init__(self, peer: int, group: Any, device: torch.device, codec: Codec, timeout: float = 600.0,
                 queue: int | None = None) -> None:
        self.peer, self.group, self.device, self.codec = peer, group, device, codec
        self.timeout, self.queue = timeout, queue
        self.buffer_device = buffer_device(group, device)
        self.bytes_sent = 0
        self.messages_sent = 0
        self._size = HEADER_BYTES
        self._under_way: deque[tuple[Any, Tensor]] = deque()

    def send(self, message: Message) -> None:
        header, size = wire.encode_header(message, self.codec)
        if size != self._size:
            announcement = _new_buffer(self._size, self.buffer_device, self.device)
            wire.announce(size, announcement)
            self._isend(announcement)
            self._size = size
        buffer = _new_buffer(size, self.buffer_device, self.device)
        wire.write(message, header, buffer, self.codec)
        if self.buffer_device != self.device:
            torch.cuda.current_stream(self.device).synchronize()  # the copy to host memory must be complete
        self._isend(buffer)
        self.messages_sent += 1

    def send_end(self, micro_batch: int) -> None:
        """Say that ``micro_batch`` and those after it will not come: the data ran out."""
        self.send(Message(micro_batch, ()))

    def flush(self, timeout: float) -> None:
        """Wait until every message has left: a process that ends before takes them with it."""
        while self._under_way:
            self._wait_for_one(timeout)

    def _wait_for_one(self, timeout: float) -> None:
        work, _ = self._under_way.popleft()
        try:
            work.wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            raise LinkError(f"rank {self.peer} did not take a message within {timeout:g} s, or is gone "
                            f"({_first(error)})") from error

    def _isend(self, buffer: Tensor) -> None:
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()
        while self.queue is not None and len(self._under_way) >= self.queue:
            self._wait_for_one(self.timeout)
        try:
            self._under_way.append((dist.isend(buffer, self.peer, group=self.group), buffer))
        except RuntimeError as error:
            raise LinkError(f"a message to rank {self.peer} could not be sent: that rank is gone ({_first(error)})") from error
        self.bytes_sent += buffer.numel()


class RemoteReceiver:
    """Receives from one rank, in order, one receive posted ahead.

    A receive is posted only for a message that is sure to come (:meth:`expect`), so that no rank leaves with a receive
    that nobody will ever answer.

    Attributes:
        end: the first micro-batch that will not come, once the sender has said so (its data ran out).
    """

    def __init__(self, peer: int, group: Any, device: torch.device, codec: Codec, timeout: float) -> None:
        self.peer, self.group, self.device, self.codec = peer, group, device, codec
        self.timeout = timedelta(seconds=timeout)
        self.buffer_device = buffer_device(group, device)
        self.arrived: deque[Message] = deque()
        self.end: int | None = None
        self._expected: deque[int] = deque()
        self._posted: tuple[Any, Tensor] | None = None
        self._size = HEADER_BYTES

    def expect(self, micro_batches: Iterable[int]) -> None:
        """The messages of ``micro_batches`` are sure to be sent, or an end of the data before them."""
        self._expected.extend(m for m in micro_batches if self.end is None or m < self.end)
        self._post()

    def _post(self) -> None:
        if self._posted is None and self._expected:
            buffer = _new_buffer(self._size, self.buffer_device, self.device)
            self._posted = (dist.irecv(buffer, self.peer, group=self.group), buffer)

    def recv(self, micro_batch: int, what: str) -> Message | None:
        """The message of ``micro_batch``, or None if the data ended before it.

        Args:
            micro_batch: its number.
            what: says in an error who waited for what.

        Raises:
            LinkError: if it does not come in time, the sender is gone, or another micro-batch comes.
        """
        if not self.arrived and not self._expected and self.end is None:
            raise LinkError(f"{what}: the plan sends no such message")
        while not self.arrived and self._expected:
            self._take_in(what)
        if self.end is not None and micro_batch >= self.end:
            return None
        return check(self.arrived.popleft(), micro_batch, what)

    def collect(self, what: str) -> list[Message]:
        """Take in every message that is sure to come, for a checkpoint; they stay to be received."""
        while self._expected:
            self._take_in(what)
        return list(self.arrived)

    def _take_in(self, what: str) -> None:
        """Wait for one buffer: a message, the announcement of a size, or the end of the data."""
        self._post()
        assert self._posted is not None
        work, buffer = self._posted
        try:
            work.wait(self.timeout)
        except RuntimeError as error:
            raise LinkError(f"{what}: nothing came within {self.timeout.total_seconds():g} s, or that rank is gone "
                            f"({_first(error)})") from error
        self._posted = None
        size = wire.read_size(buffer)
        if size != buffer.numel():
            self._size = size
            self._post()
            return
        message = wire.read(buffer, self.codec, self.device)
        if message.parts:
            self._expected.popleft()
            self.arrived.append(message)
        else:
            self.end = message.micro_batch
            self._expected = deque(m for m in self._expected if m < self.end)
        self._post()


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
