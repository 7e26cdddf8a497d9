"""Messages of any shape and type, in order, with their micro-batch checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import worlds

from ds_decoupled.errors import LinkError
from ds_decoupled.links import CODECS, Codecs, LocalLink, Message, Packed, RemoteReceiver, RemoteSender, pack
from ds_decoupled.links import message as wire


def messages() -> list[Message]:
    """Shapes and types change from message to message; parts may be missing."""
    g = torch.Generator().manual_seed(0)
    made = []
    for m in range(12):
        x = torch.randn(3 + m % 4, 5, generator=g)
        ids = torch.arange(7 * (m % 3)).view(-1, 7)
        made.append(Message(m, ((x, ids, x > 0), torch.tensor(m)) if m % 2 else (x.double().t(), None, (None, x.bfloat16()))))
    return made


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    return b is None if a is None else bool(torch.equal(a, b)) and a.dtype == b.dtype


def exchange(codec: str) -> list[str]:
    dist.init_process_group("gloo")
    group = dist.new_group([0, 1])
    cpu = torch.device("cpu")
    if dist.get_rank() == 0:
        sender = RemoteSender(1, group, cpu, Codecs(CODECS[codec]))
        for message in messages():
            sender.send(message)
        sender.wait_until_taken(20)
        assert sender.messages_sent == 12 and sender.bytes_sent > 12 * 1024
        return []
    receiver = RemoteReceiver(0, group, cpu, Codecs(CODECS[codec]), 20)
    receiver.expect(range(12))
    wrong = []
    for message in messages():
        came = receiver.recv(message.micro_batch, "the test")
        assert came is not None
        if not same(message.parts, came.parts):
            wrong.append(f"{message} {came}")
    return wrong


def test_any_shape_arrives() -> None:
    _, wrong = worlds.run(2, exchange, "none")
    assert not wrong


def test_codec_rounds_floats_alone() -> None:
    _, wrong = worlds.run(2, exchange, "bf16")
    assert len(wrong) == 12  # every message has a float32 or float64 part that is rounded


def out_of_order() -> str:
    dist.init_process_group("gloo")
    group = dist.new_group([0, 1])
    if dist.get_rank() == 0:
        sender = RemoteSender(1, group, torch.device("cpu"), Codecs())
        sender.send(Message(3, (torch.ones(2),)))
        sender.wait_until_taken(20)
        return ""
    receiver = RemoteReceiver(0, group, torch.device("cpu"), Codecs(), 20)
    receiver.expect([2])
    with pytest.raises(LinkError, match="stage 1 waits: micro-batch 3 came instead of 2"):
        receiver.recv(2, "stage 1 waits")
    with pytest.raises(LinkError, match="the plan sends no such message"):
        receiver.recv(3, "stage 1 waits")
    return "checked"


def test_another_micro_batch_is_an_error() -> None:
    assert worlds.run(2, out_of_order)[1] == "checked"
    link = LocalLink()
    link.send(Message(1, ()))
    with pytest.raises(LinkError, match="micro-batch 1 came instead of 0"):
        link.recv(0, "stage 2")
    with pytest.raises(LinkError, match="nothing was sent"):
        link.recv(0, "stage 2")


def test_any_number_of_tensors_fits() -> None:
    """The header grows: hundreds of tensors, any number of dimensions, and the types that torch has."""
    kinds = [torch.float16, torch.uint16, torch.uint32, torch.float8_e4m3fn, torch.bool, torch.complex64]
    tensors = tuple(torch.ones([1 + i % 3] * (i % 9)).to(kinds[i % len(kinds)]) for i in range(500))
    message = Message(7, (tensors, None, tensors[1]))
    header, _ = wire.encode(message, Codecs())
    assert len(header) % wire.HEADER_INTS == 0 and len(header) > 2000 and header[0] % 64 == 0
    buffer = pack(message, Codecs()).buffer
    came = Packed.arrived(buffer, Codecs(), torch.device("cpu")).unwrapped()
    assert wire.read_size(buffer) == header[0] == buffer.numel() and came.micro_batch == 7 and came.parts[1] is None
    assert len(came.parts[0]) == 500
    for a, b in zip((*tensors, tensors[1]), (*came.parts[0], came.parts[2])):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(LinkError, match="sparse_coo.*cannot travel"):
        wire.encode(Message(0, (torch.eye(3).to_sparse(),)), Codecs())
