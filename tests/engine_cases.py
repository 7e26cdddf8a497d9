"""What the ranks of a test's world run: train a small net with the engine and hand back everything worth comparing."""

from __future__ import annotations

import copy
from typing import Any

import odd_layers  # noqa: F401  (its nets join NETS)
import torch
from nets import NETS, TEXT, batches, token_batches, varied
from torch import nn

import ds_decoupled
from ds_decoupled.models import next_token_loss
from ds_decoupled.schedules import Action, Kind
from ds_decoupled.stages import Outcome
from ds_decoupled.tensors import as_tuple
from ds_decoupled.watchers import Watcher


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed JSON of a case."""
    k, size = case.get("k", 1), case.get("size", 4)
    waits = {} if case["method"] == "backprop" else {"timeout": case.get("timeout", 60)}
    return {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": k, "steps_per_print": 10**9,
            "gradient_clipping": case.get("clip", 0.0),
            "optimizer": case.get("optimizer", {"type": "SGD", "params": {"lr": case.get("lr", 0.1), "momentum": 0.9}}),
            "decoupled": {"method": case["method"], "stages": case.get("stages", "blocks"), **waits,
                          **case.get("block", {})},
            **case.get("config", {})}


def build(case: dict[str, Any]) -> Any:
    """The engine of a case, on this rank."""
    config = config_of(case)
    model = ds_decoupled.DecoupledPipelineModule(
        NETS[case.get("net", "reversible")](**case.get("net_args", {})), num_stages=case.get("pipe_ranks"), config=config,
        base_seed=1234 + case.get("seed", 0),
        loss_fn=next_token_loss if case.get("net") in TEXT else nn.CrossEntropyLoss(),
        sample_input=None if case.get("no_sample") or case.get("net") in TEXT else torch.randn(4, 2, 8, 8))
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


def heads_of(engine: Any) -> dict[int, nn.Module]:
    """Copies of the heads of this rank's stages, by stage."""
    return {s: copy.deepcopy(stage.head) for s, stage in getattr(engine, "stages", {}).items()
            if getattr(stage, "head", None) is not None}


def data_of(case: dict[str, Any], engine: Any) -> Any:
    """An iterator on the first stage's ranks (DeepSpeed's own engine wants one on the last stage's too), None elsewhere."""
    if not engine.is_first_stage() and (hasattr(engine, "stages") or not engine.is_last_stage()):
        return None
    if case.get("net") in TEXT:
        made = token_batches(case["batches"], case.get("size", 4))
    else:
        replica, replicas = engine.mpu.get_data_parallel_rank(), engine.mpu.get_data_parallel_world_size()
        made = batches(case["batches"], case.get("size", 4), replica=replica, replicas=replicas)
    return iter(varied(made) if case.get("varied") else made)


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Train, drain, and report."""
    engine = build(case)
    initial, initial_heads = state_of(engine), heads_of(engine)
    if case.get("spoil") in initial_heads:
        for parameter in engine.stages[case["spoil"]].head.parameters():
            parameter.data.mul_(1.5)
    data = data_of(case, engine)
    losses = [engine.train_batch(data).item() for _ in range(case["batches"] // case.get("k", 1))]
    engine.drain()
    summary, metrics = engine.decoupled_summary(), engine.stage_metrics()
    lrs = [stage.optimizer.param_groups[0]["lr"] for stage in getattr(engine, "stage_optimizers", {}).values()]
    return {"initial": initial, "state": state_of(engine), "losses": losses, "summary": summary, "lrs": lrs,
            "initial_heads": initial_heads, "heads": heads_of(engine), "metrics": metrics,
            "rank": engine.global_rank, "replica": engine.mpu.get_data_parallel_rank()}


def train_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """:meth:`train` of one after the other, in the same processes."""
    return [train(case) for case in cases]


def votes(case: dict[str, Any]) -> dict[str, Any]:
    """After some training: evaluation's logits, and what each stage gave for them."""
    engine = build(case)
    data = data_of(case, engine)
    for _ in range(case["batches"] // case.get("k", 1)):
        engine.train_batch(data)
    engine.drain()
    outputs: dict[int, Any] = {}
    for index, stage in engine.stages.items():
        stage.layers[-1].register_forward_hook(lambda layer, given, made, index=index: outputs.__setitem__(index, made))
    _, logits = engine.eval_batch(data_of(case, engine), return_logits=True, num_micro_batches=1)
    return {"logits": logits, "outputs": outputs, "heads": heads_of(engine), "replica": 0}


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


class AtRest(Watcher):
    """Notes every micro-batch's gradients, and how far a rebuilt input is from the one that was given.

    Attributes:
        grads: by update and ``stage.parameter``, as the optimizer found them.
        errors: ``(stage, relative error)``.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.grads: dict[tuple[int, str], torch.Tensor] = {}
        self.errors: list[tuple[int, float]] = []
        self._inputs: dict[tuple[int, int], Any] = {}

    def before(self, action: Action) -> None:
        if action.kind is Kind.UPDATE:
            for i, p in enumerate(self.engine.stages[action.stage].trainable):
                update = self.engine.stage_optimizers[action.stage].updates  # the action's number begins anew after a flush
                self.grads[update, f"{action.stage}.{i}"] = p.grad.clone()

    def acted(self, action: Action, outcome: Outcome) -> None:
        key = action.micro_batch, action.stage
        if action.kind is Kind.FORWARD:
            self._inputs[key] = outcome.inputs
        elif action.kind.is_backward:
            for rebuilt, given in zip(as_tuple(outcome.inputs), as_tuple(self._inputs.pop(key))):
                self.errors.append((action.stage, ((rebuilt - given).float().norm() / given.float().norm()).item()))


def gradients_at_rest(case: dict[str, Any]) -> dict[str, Any]:
    """Learning rate 0: every micro-batch's gradients, with what the method keeps and what it rebuilds."""
    engine = build({**case, "lr": 0.0, "k": 1})
    seen = AtRest(engine)
    engine.watch(seen)
    kept: dict[int, int] = {}
    data = data_of(case, engine)
    for _ in range(case["batches"]):
        engine.train_batch(data)
        for index, stage in engine.stages.items():
            kept[index] = max(kept.get(index, 0), len(list(stage.kept())))
    in_flight = {index: len(stage.in_flight) for index, stage in engine.stages.items()}
    engine.drain()
    return {"grads": seen.grads, "errors": seen.errors, "kept": kept, "in_flight": in_flight, "initial": state_of(engine),
            "summary": engine.decoupled_summary(), "replica": 0}


def kept_against_weights(case: dict[str, Any]) -> dict[str, Any]:
    """What stages keep between ticks, compared with every weight: by storage, and by value with all weights ever used."""
    engine = build(case)
    data = data_of(case, engine)
    versions: set[bytes] = set()
    storages = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    found: list[tuple[int, tuple[int, ...]]] = []
    kept = 0
    for _ in range(case["batches"]):
        versions |= {p.detach().numpy().tobytes() for p in engine.module.parameters() if p.ndim > 1}
        engine.train_batch(data)
        for index, stage in engine.stages.items():
            for t in stage.kept():
                kept += 1
                value = t.detach().contiguous()
                same = value.numpy().tobytes() in versions or value.mT.contiguous().numpy().tobytes() in versions \
                    if value.ndim > 1 else False
                if t.untyped_storage().data_ptr() in storages or same:
                    found.append((index, tuple(t.shape)))
    in_flight = sum(len(stage.in_flight) for stage in engine.stages.values())
    engine.drain()
    return {"kept": kept, "in_flight": in_flight, "weights": found}


def train_with_evaluation(case: dict[str, Any]) -> dict[str, Any]:
    """Train with and without an evaluation after every call; sizes of evaluation batches vary."""
    engine = build(case)
    data = data_of(case, engine)
    values, logits = [], []
    for _step in range(case["batches"] // case.get("k", 1)):
        engine.train_batch(data)
        if case["evaluate"]:
            held_out = [(x[:3], y[:3]) if i == 1 else (x, y) for i, (x, y) in enumerate(batches(3, seed=99))]
            values.append(engine.eval_batch(iter(held_out), num_micro_batches=3).item())
            out = engine.eval_batch(iter(held_out), compute_loss=False, reduce_output=None, bcast_loss=False,
                                    num_micro_batches=3)
            logits.append(None if out is None else [t.shape[0] for t in out])
    loss, last = engine.eval_batch(iter(batches(2, seed=99)), return_logits=True, num_micro_batches=2)
    engine.drain()
    return {"state": state_of(engine), "values": values, "logits": logits, "replica": 0, "last": last, "loss": loss}


def train_and_stop(case: dict[str, Any], folder: str) -> None:
    """Train ``stop`` calls and save, with everything still in flight."""
    engine = build(case)
    data = data_of(case, engine)
    for _ in range(case["stop"]):
        engine.train_batch(data)
    engine.save_checkpoint(folder, client_state={"calls": case["stop"]})


def resume(case: dict[str, Any], folder: str, also_save: str | None = None) -> dict[str, Any]:
    """Load, train the rest, drain."""
    engine = build({**case, "seed": 5})
    path, client = engine.load_checkpoint(folder)
    assert path is not None and client == {"calls": case["stop"]}
    k = case.get("k", 1)
    if also_save:
        engine.save_checkpoint(also_save, client_state=client)
    data = data_of(case, engine)
    for _ in range(case["stop"] * k if data else 0):
        next(data)
    losses = [engine.train_batch(data).item() for _ in range(case["batches"] // k - case["stop"])]
    engine.drain()
    return {"state": state_of(engine), "losses": losses, "replica": engine.mpu.get_data_parallel_rank(),
            "steps": engine.global_steps}


def data_that_end(case: dict[str, Any]) -> dict[str, Any]:
    """Train until the data end, drain, go on with new data."""
    engine = build(case)
    data = data_of(case, engine)
    calls = 0
    while True:
        try:
            engine.train_batch(data)
            calls += 1
        except StopIteration as end:
            message = str(end)
            break
    engine.drain()
    state = state_of(engine)
    again = data_of(case, engine)
    for _ in range(2):
        engine.train_batch(again)
    engine.drain()
    return {"state": state, "after": state_of(engine), "calls": calls, "message": message, "replica": 0}


def tracked(case: dict[str, Any]) -> dict[str, Any]:
    """Train with the tracker; the parameters must not notice."""
    engine = build(case)
    data = data_of(case, engine)
    for _ in range(case["batches"] // case.get("k", 1)):
        engine.train_batch(data)
    engine.drain()
    return {"state": state_of(engine), "rows": engine.decoupled_summary()["gradient_tracker"], "replica": 0}


def plain_pipeline(case: dict[str, Any]) -> dict[str, Any]:
    """A plain DeepSpeed ``PipelineModule`` of modules, a function and layers from specs."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed()
    torch.manual_seed(case.get("seed", 3))
    layers = [nn.Flatten(), nn.Linear(128, 16), torch.tanh, nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)]
    if case.get("tied"):
        from deepspeed.pipe import TiedLayerSpec

        layers = [nn.Flatten(), nn.Linear(128, 16), TiedLayerSpec("tie", nn.Linear, 16, 16), torch.tanh,
                  TiedLayerSpec("tie", nn.Linear, 16, 16), LayerSpec(nn.Linear, 16, 3)]
    model = PipelineModule(layers, num_stages=case.get("pipe_ranks", torch.distributed.get_world_size()),
                           loss_fn=nn.CrossEntropyLoss(), partition_method="uniform")
    config = config_of(case)
    if case.get("no_block"):
        del config["decoupled"]
    engine, optimizer, _, _ = ds_decoupled.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    data = data_of(case, engine) if case.get("batches") else None
    if data is None and engine.is_last_stage():  # DeepSpeed's own engine wants an iterator there too
        data = iter(batches(case["batches"]))
    losses = [engine.train_batch(data).item() for _ in range(case["batches"] // case.get("k", 1))]
    if hasattr(engine, "drain"):
        engine.drain()
    return {"state": state_of(engine), "losses": losses, "engine": type(engine).__name__, "replica": 0,
            "groups": len(optimizer.param_groups), "stages": sorted(getattr(engine, "stages", {}))}


def die_at(case: dict[str, Any], rank: int, call: int) -> list[str]:
    """One rank goes away in the middle of training; the others say who waited for what."""
    import os

    engine = build(case)
    data = data_of(case, engine)
    for step in range(case["batches"]):
        if engine.global_rank == rank and step == call:
            if case.get("hang"):
                import time

                time.sleep(case["hang"])
            os._exit(1)
        engine.train_batch(data)
    return []


def other_batch_size(case: dict[str, Any]) -> dict[str, Any]:
    """k changes between two drains."""
    engine = build(case)
    data = data_of(case, engine)
    engine.train_batch(data)
    try:
        engine.set_train_batch_size(12)
    except RuntimeError as error:
        message = str(error)
    engine.drain()
    engine.set_train_batch_size(12)
    engine.train_batch(data)
    engine.drain()
    return {"message": message, "updates": engine.decoupled_summary()["updates"], "k": engine.gradient_accumulation_steps()}


def with_training_data(case: dict[str, Any]) -> dict[str, Any]:
    """``initialize(training_data=...)``: the engine loads for itself, as DeepSpeed's does."""
    config = config_of(case)
    data = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*batches(case["batches"], case["size"]))))
    model = ds_decoupled.DecoupledPipelineModule(NETS["reversible"](), config=config, loss_fn=nn.CrossEntropyLoss())
    engine, *_ = ds_decoupled.initialize(model=model, config=config, training_data=data,
                                         model_parameters=list(model.parameters()))
    losses = [engine.train_batch().item() for _ in range(case["batches"] + 2)]  # it starts again
    engine.drain()
    return {"state": state_of(engine), "losses": losses, "replica": 0}


def only_build(case: dict[str, Any]) -> None:
    build(case)
