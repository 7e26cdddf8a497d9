"""A link between two ranks: ``isend`` and ``irecv``, one flat buffer a message, receives posted ahead.

Each direction has a process group of its own, so that a message down never waits behind a message up. Where the backend
cannot move the device's tensors (gloo with CUDA) buffers are pinned host memory, so that several ranks can share a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_decoupled.errors import LinkError, PeerError
from ds_decoupled.links import message as wire
from ds_decoupled.links.local import check
from ds_decoupled.links.message import HEADER_BYTES, Message
from ds_decoupled.links.packed import Packed
from ds_decoupled.links.places import Codecs
from ds_decoupled.links.under_way import UnderWay, first_line

#: In place of a micro-batch's number: the sender failed, and the message says why.
_FAILED = -1


def buffer_device(group: Any, device: torch.device) -> torch.device:
    """Where messages of ``group`` are assembled: on the device, or in host memory if the backend cannot reach it."""
    return torch.device("cpu") if device.type != "cpu" and dist.get_backend(group) == "gloo" else device


def _new_buffer(nbytes: int, on: torch.device, device: torch.device) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=on, pin_memory=on.type == "cpu" and device.type == "cuda")


class RemoteSender:
    """Sends to one rank. A send does not wait, unless the queue is full; a buffer is let go when the peer has taken it.

    Args:
        peer: the receiver's global rank.
        group: the process group of this direction.
        device: where the tensors live.
        codecs: this side's, of the parts' values; the receiver's must be of the same kinds.
        timeout: seconds that a send may wait for room in the queue.
        queue: messages that may be under way at once; None for any number.
        seed: what codecs that round by chance draw from, asked at every message.

    Attributes:
        under_way: what the peer has not taken yet.
    """

    def __init__(self, peer: int, group: Any, device: torch.device, codecs: Codecs, timeout: float = 600.0,
                 queue: int | None = None, seed: Callable[[], tuple[int, ...]] = tuple) -> None:
        self.peer, self.group, self.device, self.codecs = peer, group, device, codecs
        self.timeout, self.queue, self.seed = timeout, queue, seed
        self.buffer_device = buffer_device(group, device)
        self.bytes_sent = 0
        self.messages_sent = 0
        self._size = HEADER_BYTES
        self.under_way = UnderWay(group, f"rank {peer}")

    def send(self, message: Message) -> None:
        if self.queue is not None:
            self.under_way.wait_below(self.queue, self.timeout)
        self._send(message)
        self.messages_sent += 1

    def send_end(self, micro_batch: int, reason: str | None = None) -> None:
        """Say that ``micro_batch`` and those after it will not come: the data ran out, or failed for ``reason``."""
        self.send(Message(micro_batch, () if reason is None else (None, self._text(reason))))

    def send_failure(self, rank: int, reason: str) -> None:
        """Say that pipe rank ``rank`` failed, and why. Never waits."""
        self._send(Message(_FAILED, (None, self._text(f"{rank} {reason}"))))

    def _text(self, text: str) -> Tensor:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.device)

    def wait_until_taken(self, timeout: float) -> None:
        """Wait until every message was taken: a process that ends before takes them with it."""
        # Taken means that gloo has handed the buffer over, not that the peer's program has looked at it.
        self.under_way.wait_below(1, timeout)

    def _send(self, message: Message) -> None:
        header, coded = wire.encode(message, self.codecs, self.seed())
        size = header[0]
        if size != self._size:
            announcement = _new_buffer(self._size, self.buffer_device, self.device)
            wire.announce(size, announcement)
            self._isend(announcement)
            self._size = size
        buffer = _new_buffer(size, self.buffer_device, self.device)
        wire.write(header, coded, buffer)
        if self.buffer_device != self.device:
            torch.cuda.current_stream(self.device).synchronize()  # the copy to host memory must be complete
        self._isend(buffer)

    def _isend(self, buffer: Tensor) -> None:
        try:
            self.under_way.add(self._start(buffer), buffer)
        except RuntimeError as error:
            raise LinkError(f"a message to rank {self.peer} could not be sent: that rank is gone "
                            f"({first_line(error)})") from error
        self.bytes_sent += buffer.numel()

    def _start(self, buffer: Tensor) -> Any:
        return dist.isend(buffer, self.peer, group=self.group)


class RemoteReceiver:
    """Receives from one rank, in order, one receive posted ahead.

    A receive is posted only for a message that is sure to come (:meth:`expect`), so that no rank leaves with a receive
    that nobody will ever answer.

    Args:
        peer: the sender's global rank.
        group: the process group of this direction.
        device: where the tensors are wanted.
        codecs: this side's.
        timeout: seconds that a receive may take.
        packed: whether messages are handed out in their wire form.

    Attributes:
        end: the first micro-batch that will not come, once the sender has said so (its data ran out, or failed).
        end_reason: why, if the data failed.
        whose: what has the number of a rank that failed.
    """

    whose: ClassVar[str] = "pipe rank"

    def __init__(self, peer: int, group: Any, device: torch.device, codecs: Codecs, timeout: float,
                 packed: bool = False) -> None:
        self.peer, self.group, self.device, self.codecs, self.packed = peer, group, device, codecs, packed
        self.timeout = timedelta(seconds=timeout)
        self.buffer_device = buffer_device(group, device)
        self.arrived: deque[Message | Packed] = deque()
        self.end: int | None = None
        self.end_reason: str | None = None
        self._expected: deque[int] = deque()
        self._failure: tuple[int, str] | None = None
        self._posted: tuple[Any, Tensor] | None = None
        self._size = HEADER_BYTES

    def start(self) -> None:
        """New data follow: no end is known."""
        self.end = self.end_reason = None

    def expect(self, micro_batches: Iterable[int]) -> None:
        """The messages of ``micro_batches`` are sure to be sent, or an end of the data before them."""
        # The caller's list was made before this side knew of the end.
        self._expected.extend(m for m in micro_batches if self.end is None or m < self.end)
        self._post()

    def _post(self) -> None:
        if self._posted is None and self._expected:
            buffer = _new_buffer(self._size, self.buffer_device, self.device)
            self._posted = (self._start(buffer), buffer)

    def _start(self, buffer: Tensor) -> Any:
        return dist.irecv(buffer, self.peer, group=self.group)

    def recv(self, micro_batch: int, what: str) -> Message | Packed | None:
        """The message of ``micro_batch``, or None if the data ended before it.

        Args:
            micro_batch: its number.
            what: says in an error who waited for what.

        Raises:
            LinkError: if it does not come in time, the sender is gone, or another micro-batch comes.
            PeerError: if the sender said that a rank failed.
        """
        if not self.arrived and not self._expected and self.end is None:
            raise LinkError(f"{what}: the plan sends no such message")
        while not self.arrived and self._expected:
            self._take_in(what)
        if self.end is not None and micro_batch >= self.end:
            return None
        return check(self.arrived.popleft(), micro_batch, what)

    def collect(self, what: str) -> list[Message | Packed]:
        """Take in every message that is sure to come, for a checkpoint; they stay to be received."""
        while self._expected:
            self._take_in(what)
        return list(self.arrived)

    @property
    def held(self) -> int:
        """Messages that came and were not asked for yet; a buffer for the next one is not counted."""
        return len(self.arrived)

    @property
    def _silent(self) -> str:
        return f"nothing came within {self.timeout.total_seconds():g} s, or that rank is gone"

    def _take_in(self, what: str) -> None:
        """Wait for one buffer: a message, the announcement of a size, the end of the data, or why the sender failed."""
        self._raise_if_failed(what)
        self._post()
        assert self._posted is not None
        work, buffer = self._posted
        try:
            work.wait(self.timeout)
        except RuntimeError as error:
            raise LinkError(f"{what}: {self._silent} ({first_line(error)})") from error
        self._posted = None
        # gloo does not say how much came: the header does (see links/message.py).
        size = wire.read_size(buffer)
        if size != buffer.numel():
            self._size = size
            self._post()
            return
        message = Packed.arrived(buffer, self.codecs, self.device)
        if message.micro_batch == _FAILED:
            rank, _, reason = _read_text(message).partition(" ")
            self._failure = int(rank), reason
            self._raise_if_failed(what)
        parts = message.layout.parts
        if parts and parts[0] is not None:
            self._expected.popleft()
            self.arrived.append(message if self.packed else message.unwrapped())
        else:
            self.end = message.micro_batch
            self.end_reason = _read_text(message) if parts else None
            self._expected = deque(m for m in self._expected if m < self.end)
        self._post()

    def _raise_if_failed(self, what: str) -> None:
        if self._failure is not None:
            rank, reason = self._failure
            raise PeerError(f"{what}, but {self.whose} {rank} failed: {reason}", rank, reason)


def _read_text(message: Packed) -> str:
    return bytes(message.unwrapped().parts[1].tolist()).decode(errors="replace")
