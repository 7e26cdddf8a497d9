"""What iterators give: every form that DeepSpeed takes, or one sentence on every rank; then nothing in flight is lost."""

from __future__ import annotations

from typing import Any

import engine_cases
import pytest
import torch
import worlds
from nets import batches
from torch import Tensor, nn

from ds_decoupled.errors import BatchError
from ds_decoupled.feed import Feed

WRONG = {
    "three parts": lambda x, y: (x, y, y),
    "one part": lambda x, y: (x,),
    "inputs alone": lambda x, y: x,
    "nothing": lambda x, y: None,
    "a dictionary": lambda x, y: {"x": x, "labels": y},
    "labels that are numbers": lambda x, y: (x, y.tolist()),
    "a label that is one number": lambda x, y: (x, 3),
    "labels that are an array": lambda x, y: (x, y.numpy()),
    "labels that are words": lambda x, y: (x, ["cat"] * len(y)),
    "labels in a dictionary": lambda x, y: (x, {"labels": y}),
    "inputs that are an array": lambda x, y: (x.numpy(), y),
    "no inputs": lambda x, y: ((), y),
    "inputs nested too deep": lambda x, y: (((x, x), x), y),
    "a string": lambda x, y: "batch",
}


@pytest.mark.parametrize("form", WRONG)
def test_a_wrong_form_is_one_sentence(form: str) -> None:
    [(x, y)] = batches(1)
    feed = Feed(torch.device("cpu"), needs_labels=True)
    with pytest.raises(BatchError) as error:
        feed.next(iter([WRONG[form](x, y)]), None, "train_batch")
    text = str(error.value)
    assert "\n" not in text and "must be" in text and len(text) < 300


ITERABLES = [[1, 2], torch.utils.data.DataLoader(torch.zeros(2, 2)), range(3)]


@pytest.mark.parametrize("given", ITERABLES, ids=lambda given: type(given).__name__)
def test_an_iterable_is_no_iterator(given: Any) -> None:
    with pytest.raises(BatchError, match=f"a {type(given).__name__} is none: make one with iter"):
        Feed(torch.device("cpu"), True).next(given, None, "eval_batch")


def test_forms_that_are_taken() -> None:
    [(x, y)] = batches(1)
    feed, without = Feed(torch.device("cpu"), needs_labels=True), Feed(torch.device("cpu"), needs_labels=False)

    def taken(batch: Any, by: Feed = feed, batch_fn: Any = None) -> Any:
        return by.next(iter([batch]), batch_fn, "train_batch")

    assert taken((x, None))[1] is None
    assert taken([x, y])[1].equal(y)
    inputs, labels = taken(([x, x], (y, y)))
    assert isinstance(inputs, tuple) and isinstance(labels, tuple)
    assert taken(x, without)[1] is None and taken((x,), without)[0].equal(x)
    assert taken({"a": x, "b": y}, feed, lambda batch: (batch["a"], batch["b"]))[1].equal(y)
    again = x.clone().requires_grad_()
    got, _ = taken((again, y))
    again.data.zero_()
    assert got.equal(x) and not got.requires_grad  # its own copy: the iterator may fill the same tensor again


# On ranks


class Wrong(RuntimeError):
    pass


def data_with(fault: str, at: int, count: int) -> Any:
    for m, (x, y) in enumerate(batches(count)):
        if m == at:
            if fault == "raises":
                raise Wrong("picture 7 is torn")
            yield WRONG[fault](x, y)
        yield x, y


def train_on_wrong_data(case: dict[str, Any]) -> dict[str, Any]:
    """Train until the data go wrong, drain, go on with others; the same in evaluation."""
    engine = engine_cases.build(case)
    data = data_with(case["fault"], case["at"], 20)
    messages, calls = [], 0
    for _ in range(2):  # the second call says it again
        try:
            while True:
                engine.train_batch(data)
                calls += 1
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    try:
        engine.eval_batch(data_with(case["fault"], 1, 3), num_micro_batches=3)
    except Exception as error:
        messages.append(f"{type(error).__name__}: {error}")
    engine.drain()
    state = engine_cases.state_of(engine)
    for x in batches(2, seed=9):
        engine.train_batch(iter([x]))
    value = engine.eval_batch(iter(batches(2)), num_micro_batches=2).item()
    engine.drain()
    return {"messages": messages, "calls": calls, "state": state, "replica": 0, "value": value}


@pytest.mark.parametrize("method, fault, ranks", [("petra", "three parts", 3), ("delayed", "raises", 2), ("dgl", "nothing", 2),
                                                  ("reversible", "raises", 2)])
def test_every_rank_says_it_and_nothing_is_lost(method: str, fault: str, ranks: int) -> None:
    block = {"head": "odd_layers:linear_head"} if method == "dgl" else {}
    case = {"method": method, "fault": fault, "at": 6, "batches": 6, "block": block,
            "net": "counted" if method == "dgl" else "reversible", "stages": 4}
    results = worlds.run(ranks, train_on_wrong_data, case)
    sentence = "picture 7 is torn" if fault == "raises" else "a micro-batch must be (inputs, labels), and this one is"
    for rank, result in enumerate(results):
        first, second, evaluation = result["messages"]
        if method == "reversible":  # a flush ends the run, and the second call finds the iterator at its end
            assert second.startswith("StopIteration")
            second = first
        for message in (first, second, evaluation):
            assert sentence in message
            assert not rank or message.startswith("PeerError: the data of pipe rank 0 failed before micro-batch")
    # What was in flight came through: the same as six good micro-batches and a drain.
    whole = engine_cases.merged(worlds.run(ranks, engine_cases.train, {**case, "batches": 6}))
    for name, value in engine_cases.merged(results).items():
        assert torch.equal(value, whole[name]), name


def replicas_with_wrong_data(case: dict[str, Any]) -> str:
    """Two replicas, one of which has bad data."""
    engine = engine_cases.build(case)
    replica = engine.mpu.get_data_parallel_rank()
    data = data_with("raises", 3, 6) if replica == 1 else iter(batches(6))
    try:
        while True:
            engine.train_batch(data)
    except Exception as error:
        engine.drain()
        try:
            engine.eval_batch(data_with("raises", 1 if replica == 1 else 9, 3), num_micro_batches=3)
        except Exception as evaluation:
            return f"{error} | {evaluation}"
    return "no error"


def test_another_replicas_data() -> None:
    for text in worlds.run(2, replicas_with_wrong_data, {"method": "delayed", "pipe_ranks": 1, "batches": 6}):
        train, evaluation = text.split(" | ")
        assert "picture 7 is torn" in train and "picture 7 is torn" in evaluation


def replicas_of_different_length(case: dict[str, Any]) -> tuple[str, int]:
    """Two replicas, one of which has less data; then both go on with other data."""
    engine = engine_cases.build(case)
    data, calls = iter(batches(3 + 2 * engine.mpu.get_data_parallel_rank())), 0
    try:
        while True:
            engine.train_batch(data)
            calls += 1
    except StopIteration as end:
        engine.drain()
        engine.train_batch(iter(batches(1)))
        engine.drain()
        return str(end), calls


def test_replicas_stop_with_the_first_that_ends() -> None:
    for text, calls in worlds.run(2, replicas_of_different_length, {"method": "delayed", "pipe_ranks": 1, "batches": 6}):
        assert "the data ended before micro-batch 3" in text and calls == 3


class OwnLoss(nn.Module):
    """Gives the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


def without_labels(case: dict[str, Any], form: str) -> list[float]:
    import ds_decoupled

    layers = [nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), OwnLoss()]
    torch.manual_seed(0)
    for layer in layers:
        for p in layer.parameters():
            nn.init.normal_(p, std=0.1)
    config = engine_cases.config_of(case)
    model = ds_decoupled.DecoupledPipelineModule(layers, config=config)
    engine, *_ = ds_decoupled.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    made = [{"alone": x, "one": (x,), "none": (x, None), "labels": (x, y)}[form] for x, y in batches(8)]
    losses = [engine.train_batch(iter([batch])).item() for batch in made[:6]]
    engine.drain()
    return [*losses[-2:], engine.eval_batch(iter(made[6:]), num_micro_batches=2).item()]


def test_a_model_that_gives_its_own_loss_needs_no_labels() -> None:
    case = {"method": "delayed", "stages": 2, "batches": 0}
    results = [worlds.run(2, without_labels, case, form)[1] for form in ("alone", "one", "none", "labels")]
    assert results[0] == results[1] == results[2] == results[3]


def load_after_wrong_data(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Save, meet wrong data, load: the run goes on as if they had not come."""
    engine = engine_cases.build(case)
    good = batches(8)
    for batch in good[:3]:
        engine.train_batch(iter([batch]))
    engine.save_checkpoint(folder)
    wrong = data_with("raises", 1, 3)
    with pytest.raises(RuntimeError, match="picture 7 is torn"):  # the iterator's own error, a PeerError elsewhere
        for _ in range(30):
            engine.train_batch(wrong)
    engine.load_checkpoint(folder)
    for batch in good[3:]:
        engine.train_batch(iter([batch]))
    engine.drain()
    return {"state": engine_cases.state_of(engine), "replica": 0}


def test_a_checkpoint_forgets_wrong_data(tmp_path: Any) -> None:
    case = {"method": "delayed", "batches": 8}
    resumed = engine_cases.merged(worlds.run(2, load_after_wrong_data, case, str(tmp_path)))
    whole = engine_cases.merged(worlds.run(2, engine_cases.train, case))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
