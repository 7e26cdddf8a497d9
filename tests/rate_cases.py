"""What ranks run to see which learning rates their stages really step with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from engine_cases import config_of, data_of, state_of
from nets import NETS
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers

import ds_decoupled
from ds_decoupled.models import next_token_loss


class WarmUp:
    """A callable object, as ``LambdaLR`` takes."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def __call__(self, update: int) -> float:
        return min(1.0, (update + 1) / self.updates)


def sequence(optimizer: Any) -> Any:
    return torch_schedulers.SequentialLR(optimizer, [torch_schedulers.LambdaLR(optimizer, WarmUp(3)),
                                                     torch_schedulers.StepLR(optimizer, 2, 0.5)], milestones=[3])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "halves": lambda optimizer: torch_schedulers.StepLR(optimizer, 1, 0.5),
    "warm-up": lambda optimizer: torch_schedulers.LambdaLR(optimizer, lambda u: (u + 1) / 5),
    "cycle": lambda optimizer: torch_schedulers.OneCycleLR(optimizer, max_lr=0.5, total_steps=40),
    "sequence": sequence,
    "deepspeed": lambda optimizer: WarmupDecayLR(optimizer, total_num_steps=30, warmup_num_steps=4, warmup_max_lr=0.3),
}


def groups_of(model: nn.Module, layers: list[Any], start: int) -> list[dict[str, Any]]:
    """The model's first layer has a rate of its own, and so have biases and norms; a rank may have none of a group."""
    first = {id(p) for p in layers[0].parameters()} if start == 0 else set()
    rest = [p for p in model.parameters() if id(p) not in first]
    return [{"params": [p for p in model.parameters() if id(p) in first], "lr": 0.05},
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in rest if p.ndim <= 1], "lr": 0.02}]


def sgd(groups: Any) -> Any:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def expected(name: str, updates: int) -> list[list[tuple[float, float]]]:
    """Rate and momentum of every group at every update, from torch alone."""
    optimizer = sgd([{"params": [nn.Parameter(torch.zeros(1))], **own} for own in ({"lr": 0.05}, {}, {"lr": 0.02})])
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for _ in range(updates):
        rates.append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def start(case: dict[str, Any]) -> tuple[Any, Any, Any, dict[int, list[Any]]]:
    """The engine of a case, the user's own optimizer and scheduler, and by stage what its steps found in its groups."""
    config = config_of({"net": "norm_free", **case})
    if case["optimizer_as"] != "json":
        del config["optimizer"]
    model = ds_decoupled.DecoupledPipelineModule(NETS["norm_free"](), config=config, loss_fn=nn.CrossEntropyLoss(),
                                                 base_seed=1234)
    groups = groups_of(model, model.forward_funcs, model._local_start)
    optimizer = {"json": None, "callable": sgd, "instance": None}[case["optimizer_as"]]
    if case["optimizer_as"] == "instance":
        optimizer = sgd(groups)
    make, scheduler = SCHEDULERS[case["scheduler"]], None
    if case["scheduler_as"] == "callable":
        scheduler = make
    if case["scheduler_as"] == "instance":
        scheduler = make(optimizer)
    engine, *_ = ds_decoupled.initialize(model=model, config=config, optimizer=optimizer, lr_scheduler=scheduler,
                                         model_parameters=groups)
    used: dict[int, list[Any]] = {}
    stages = {s: stage.basic_optimizer for s, stage in engine.stage_optimizers.items()} if hasattr(engine, "stages") else \
        {0: engine.basic_optimizer}
    first = {id(p) for p in engine.module.forward_funcs[0].parameters()} if engine.is_first_stage() else set()
    for index, basic in stages.items():
        used[index] = []
        kinds = [0 if any(id(p) in first for p in g["params"]) else 1 if g["params"][0].ndim > 1 else 2
                 for g in basic.param_groups]

        def note(stepped: Any, args: Any, kwargs: Any, index: int = index, kinds: Any = kinds) -> None:
            if not case.get("config"):
                used[index].append({kind: (g["lr"], g["momentum"]) for kind, g in zip(kinds, stepped.param_groups)})
                return
            for group in stepped.param_groups:  # parameters are flattened there, and ZeRO steps group by group
                kind = {0.05: 0, 0.1: 1, 0.02: 2}[group["initial_lr"]]
                if not used[index] or kind in used[index][-1]:
                    used[index].append({})
                used[index][-1][kind] = group["lr"], group["momentum"]

        basic.register_step_pre_hook(note)
    return engine, optimizer, scheduler, used


def rates(case: dict[str, Any]) -> dict[str, Any]:
    """Train and report what each update of each stage stepped with, update by update and call by call."""
    warnings.simplefilter("error", UserWarning)  # torch's schedulers warn of steps in the wrong order
    engine, optimizer, scheduler, used = start(case)
    by_hand = None
    if case["scheduler_as"] == "assigned":
        engine.lr_scheduler = SCHEDULERS[case["scheduler"]](engine.optimizer)
    if case["scheduler_as"] == "assigned for the instance":
        engine.lr_scheduler = SCHEDULERS[case["scheduler"]](optimizer)
    if case["scheduler_as"] == "by hand":
        by_hand = SCHEDULERS[case["scheduler"]](engine.optimizer)
    if case["scheduler_as"] == "by hand for the instance":
        by_hand = SCHEDULERS[case["scheduler"]](optimizer)
    data, calls = data_of(case, engine), []
    if "load" in case:
        engine.load_checkpoint(case["load"])
        for _ in range(case["stop"] if data else 0):
            next(data)
    for call in range(case["stop"] if "load" in case else 0, case["batches"]):
        if "save" in case and call == case["stop"]:
            engine.save_checkpoint(case["save"])
        before = {s: len(noted) for s, noted in used.items()}
        if case.get("remove") == call:
            taken, engine.lr_scheduler = engine.lr_scheduler, None
        if case.get("put_back") == call:
            engine.lr_scheduler = taken
        if case.get("set") == call:
            for group in engine.optimizer.param_groups if case["optimizer_as"] == "json" else optimizer.param_groups:
                group["lr"] = 0.007
        engine.train_batch(data)
        if by_hand is not None:
            by_hand.step()
        calls.append({s: noted[before[s]:] for s, noted in used.items()})
    held = scheduler if case["scheduler_as"] == "instance" else engine.lr_scheduler
    top = max(used)
    shown = None if held is None else (held.get_last_lr() if hasattr(held, "get_last_lr") else None)
    face = None if optimizer is None or callable(optimizer) else [g["lr"] for g in optimizer.param_groups]
    engine.drain()
    return {"used": used, "calls": calls, "shown": shown, "face": face, "top": len(calls[-1][top]) and top,
            "state": state_of(engine), "replica": 0, "lr": engine.get_lr()}


def all_rates(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several cases, one after the other."""
    return [rates(case) for case in cases]


def refused(cases: list[dict[str, Any]]) -> list[str]:
    """What is said to each."""
    messages = []
    for case in cases:
        try:
            if case["scheduler_as"] == "for another":
                config = config_of({"net": "norm_free", **case})
                model = ds_decoupled.DecoupledPipelineModule(NETS["norm_free"](), config=config,
                                                             loss_fn=nn.CrossEntropyLoss(), base_seed=1234)
                other = SCHEDULERS["halves"](sgd(list(model.parameters())))
                ds_decoupled.initialize(model=model, config=config, lr_scheduler=other,
                                        model_parameters=list(model.parameters()))
            elif case["scheduler_as"] == "plateau":
                engine, optimizer, *_ = start({**case, "scheduler_as": "none"})
                engine.lr_scheduler = torch_schedulers.ReduceLROnPlateau(engine.optimizer)
            else:
                engine, optimizer, *_ = start({**case, "scheduler_as": "none"})
                optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
                engine.train_batch(data_of(case, engine))
                engine.drain()
            messages.append("")
        except (ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def heads_moved(case: dict[str, Any]) -> dict[str, Any]:
    """Local losses with the user's optimizer and scheduler: which parameters of heads moved, and the rates at the end."""
    config = config_of({**case, "method": "dgl", "stages": 6, "block": {"input_shape": [6]}})
    del config["optimizer"]
    model = ds_decoupled.DecoupledPipelineModule(NETS["gpt"](**case["net_args"]), config=config, loss_fn=next_token_loss,
                                                 base_seed=1234)
    optimizer = sgd(list(model.parameters()))
    engine, *_ = ds_decoupled.initialize(model=model, config=config, optimizer=optimizer,
                                         lr_scheduler=SCHEDULERS["halves"](optimizer))
    heads = [p for stage in engine.stages.values() for p in stage.head_parameters]
    before = [p.detach().clone() for p in heads]
    data = data_of({**case, "net": "gpt"}, engine)
    for _ in range(case["batches"]):
        engine.train_batch(data)
    engine.drain()
    return {"moved": [not torch.equal(a, b) for a, b in zip(heads, before)],
            "rates": [group["lr"] for group in engine.optimizer.param_groups]}
