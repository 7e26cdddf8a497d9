"""What the ranks of ``wrong_settings.py`` do: the script of a user who got something wrong."""

from __future__ import annotations

import base64
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from nets import batches, reversible_net
from torch import nn
from wrong_cases import BASE, CASES, Wrong, changed

import ds_decoupled
from run.worlds import Parent


def _fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no room here")


class Fails(nn.Module):
    """Cannot be built on one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        if int(os.environ["RANK"]) == rank:
            _fail()


def _on(rank: int, inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: (_fail if int(os.environ["RANK"]) == rank else inner)(*args)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def _step_lr(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 10)


#: What a script does otherwise: arguments of the module, of ``initialize``, layers, model.
CALLS: dict[str, dict[str, Any]] = {
    "": {},
    "activation_checkpoint_interval=1": {"module": {"activation_checkpoint_interval": 1}},
    "num_stages=3": {"module": {"num_stages": 3}},
    "num_stages=0": {"module": {"num_stages": 0}},
    "an optimizer that fails on rank 0": {"initialize": {"optimizer": _on(0, _sgd)}},
    "an optimizer that fails on rank 1": {"initialize": {"optimizer": _on(1, _sgd)}},
    "a scheduler that fails on rank 1": {"initialize": {"lr_scheduler": _on(1, _step_lr)}},
    "a layer that cannot be built on rank 0": {"last": LayerSpec(Fails, 0)},
    "a layer that cannot be built on rank 1": {"last": LayerSpec(Fails, 1)},
    "no pipeline": {"model": lambda: nn.Linear(2, 2)},
    "no file on rank 1": {"config_of_rank_1": "no_such_file.json"},
    "another seed on rank 1": {"module_of_rank_1": {"base_seed": 3}},
    "fewer layers on rank 1": {"fewer_on_rank_1": True},
}


def attempt(case: Wrong, folder: str) -> None:
    """One rank's part: what a user's script does, and one update."""
    call, rank = CALLS[case.call], int(os.environ["RANK"])
    config: Any = changed(BASE, case.change)
    if rank == 1 and case.of_rank_1:
        config = changed(config, case.of_rank_1)
    if case.text is not None:
        path = Path(folder) / "ds.json"
        path.write_bytes(case.text)
        config = base64.urlsafe_b64encode(case.text).decode() if case.as_base64 else str(path)
    if rank == 1 and "config_of_rank_1" in call:
        config = call["config_of_rank_1"]
    layers = [*reversible_net(), *([call["last"]] if "last" in call else [])]
    if rank == 1 and "fewer_on_rank_1" in call:
        layers = layers[:-1]
    if "model" in call:
        model = call["model"]()
    else:
        arguments = {**call.get("module", {}), **(call.get("module_of_rank_1", {}) if rank == 1 else {})}
        model = ds_decoupled.DecoupledPipelineModule(layers, config=config, loss_fn=nn.CrossEntropyLoss(), **arguments)
    engine, *_ = ds_decoupled.initialize(model=model, config=config, **call.get("initialize", {}))
    k = engine.gradient_accumulation_steps()
    engine.train_batch(iter(batches(k, 4)) if engine.is_first_stage() else None)
    engine.drain()


def serve(parent: Parent) -> None:
    """Try the case whose number comes, say what was raised, wait for the next."""
    import deepspeed

    deepspeed.init_distributed()
    parent.tell(ds_decoupled.__file__)
    with tempfile.TemporaryDirectory() as folder:
        while True:
            case = CASES[parent.told()]
            start = time.monotonic()
            try:
                attempt(case, folder)
                said = "nothing raised"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            parent.tell((said, time.monotonic() - start))
