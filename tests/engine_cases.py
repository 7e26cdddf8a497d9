"""What the ranks of a test's world run: train a small net with the engine and hand back everything worth comparing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import ds_decoupled
from nets import NETS, batches


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed JSON of a case."""
    k, size = case.get("k", 1), case.get("size", 4)
    return {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": k, "steps_per_print": 10**9,
            "gradient_clipping": case.get("clip", 0.0),
            "optimizer": case.get("optimizer", {"type": "SGD", "params": {"lr": case.get("lr", 0.1), "momentum": 0.9}}),
            "decoupled": {"method": case["method"], "stages": case.get("stages", "blocks"), "timeout": case.get("timeout", 60),
                          **case.get("block", {})},
            **case.get("config", {})}


def build(case: dict[str, Any]) -> Any:
    """The engine of a case, on this rank."""
    config = config_of(case)
    model = ds_decoupled.DecoupledPipelineModule(
        NETS[case.get("net", "reversible")](**case.get("net_args", {})), num_stages=case.get("pipe_ranks"), config=config,
        loss_fn=nn.CrossEntropyLoss(), sample_input=torch.randn(4, 2, 8, 8))
    decay = case.get("decay", 1.0)
    scheduler = (lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)) if decay != 1.0 else None
    engine, *_ = ds_decoupled.initialize(model=model, config=config, lr_scheduler=scheduler,
                                         model_parameters=list(model.parameters()))
    return engine


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """Parameters and running statistics of this rank's layers, by ``layer index.name``."""
    state = {}
    for index, layer in enumerate(engine.module.forward_funcs, engine.module._local_start):
        if isinstance(layer, nn.Module):
            state.update({f"{index}.{name}": value.detach().clone() for name, value in layer.state_dict().items()})
    return state


def data_of(case: dict[str, Any], engine: Any) -> Any:
    """An iterator on the first stage's ranks, None elsewhere."""
    if not engine.is_first_stage():
        return None
    replica, replicas = engine.mpu.get_data_parallel_rank(), engine.mpu.get_data_parallel_world_size()
    return iter(batches(case["batches"], case.get("size", 4), replica=replica, replicas=replicas))


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Train, drain, and report."""
    engine = build(case)
    initial = state_of(engine)
    data = data_of(case, engine)
    losses = [engine.train_batch(data).item() for _ in range(case["batches"] // case.get("k", 1))]
    if hasattr(engine, "drain"):
        engine.drain()
        summary = engine.decoupled_summary()
    else:
        summary = {}
    return {"initial": initial, "state": state_of(engine), "losses": losses, "summary": summary,
            "rank": engine.global_rank, "replica": engine.mpu.get_data_parallel_rank()}


def merged(results: list[dict[str, Any]], key: str = "state") -> dict[str, torch.Tensor]:
    """The whole model's state, from the ranks of the first replica."""
    whole: dict[str, torch.Tensor] = {}
    for result in results:
        if result["replica"] == 0:
            whole.update(result[key])
    return whole


def stages_from(initial: dict[str, torch.Tensor], case: dict[str, Any], bounds: list[list[int]]) -> list[nn.Sequential]:
    """The same net in one process, for the oracle; ``bounds`` are each stage's layers."""
    layers = [spec.build() for spec in NETS[case.get("net", "reversible")](**case.get("net_args", {}))]
    for index, layer in enumerate(layers):
        layer.load_state_dict({name.split(".", 1)[1]: copy.deepcopy(value) for name, value in initial.items()
                               if name.split(".", 1)[0] == str(index)})
        layer.train()
    return [nn.Sequential(*(layers[i] for i in stage)) for stage in bounds]
