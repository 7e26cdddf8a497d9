"""What ranks run with layers of unusual kinds: sparse gradients, experts, many tensors, nothing to train, feature vectors."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.pipe import LayerSpec
from engine_cases import config_of, state_of
from torch import Tensor, nn

import ds_decoupled


class Words(nn.Module):
    """Mean of the words' embeddings."""

    def __init__(self, sparse: bool, bag: bool = False) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(20, 8, sparse=sparse, mode="mean") if bag else nn.Embedding(20, 8, sparse=sparse)
        self.bag = bag

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return x if self.bag else x.mean(1)


class Fan(nn.Module):
    """One tensor to many, of several dimensions."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, count)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.view(-1, *[1] * (i % 7)) for i, part in enumerate(self.linear(x).unbind(1)))


class Gather(nn.Module):
    """Many tensors to three classes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(count, 3)

    def forward(self, parts: tuple[Tensor, ...]) -> Tensor:
        return self.linear(torch.stack([part.flatten() for part in parts], 1))


class Features(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = MoE(8, nn.Linear(8, 8), num_experts=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def layers_of(case: dict[str, Any]) -> list[Any]:
    kind = case["kind"]
    if kind == "words":
        return [LayerSpec(Words, case["sparse"], case.get("bag", False)), LayerSpec(Features, 8, 8), LayerSpec(nn.Linear, 8, 3)]
    if kind == "many":
        return [LayerSpec(Features, 20, 8), LayerSpec(Fan, case["count"]), LayerSpec(nn.Identity),
                LayerSpec(Gather, case["count"])]
    if kind == "experts":
        return [LayerSpec(Features, 20, 8), LayerSpec(Experts), LayerSpec(nn.Linear, 8, 3)]
    return [LayerSpec(Features, 20, 8), LayerSpec(Features, 8, 6), LayerSpec(Features, 6, 6), LayerSpec(nn.Linear, 6, 3)]


def made_batches(case: dict[str, Any], replica: int = 0, replicas: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(case["batches"]):
        x = torch.randint(0, 20, (4 * replicas, 5), generator=generator) if case["kind"] == "words" else \
            torch.randn(4 * replicas, 20, generator=generator)
        y = torch.randint(0, 3, (4 * replicas,), generator=generator)
        made.append((x[replica * 4:(replica + 1) * 4], y[replica * 4:(replica + 1) * 4]))
    return made


def make(case: dict[str, Any]) -> Any:
    """The engine of a case."""
    config = config_of({"stages": len(layers_of(case)), **case})
    if case.get("no_optimizer"):
        del config["optimizer"]
    model = ds_decoupled.DecoupledPipelineModule(layers_of(case), base_seed=1234, num_stages=case.get("pipe_ranks"),
                                                 config=config,
                                                 loss_fn=nn.CrossEntropyLoss())
    for index, layer in enumerate(model.forward_funcs, model._local_start):
        if index in case.get("frozen", ()):
            layer.requires_grad_(False)
    engine, *_ = ds_decoupled.initialize(model=model, config=config)
    return engine


def learn(case: dict[str, Any]) -> dict[str, Any]:
    """Train, evaluate, and report."""
    engine = make(case)
    replica, replicas = engine.mpu.get_data_parallel_rank(), engine.mpu.get_data_parallel_world_size()
    data = iter(made_batches(case, replica, replicas)) if engine.is_first_stage() else None
    start = state_of(engine)
    value = engine.eval_batch(iter(made_batches(case)), num_micro_batches=2).item()
    message = ""
    try:
        for _ in range(case["batches"] // case.get("k", 1)):
            engine.train_batch(data)
        engine.drain()
    except RuntimeError as error:
        message = str(error)
    return {"start": start, "state": state_of(engine), "message": message, "value": value, "replica": replica,
            "rows": engine.decoupled_summary()["gradient_tracker"]}


def learn_many(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several cases, one after the other; what is refused is told in words."""
    results = []
    for case in cases:
        try:
            results.append(learn(case))
        except ValueError as error:
            results.append({"message": f"{type(error).__name__}: {error}"})
    return results
