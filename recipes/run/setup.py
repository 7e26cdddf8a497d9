"""What a training recipe knows before it reads any data: the DeepSpeed configuration, and this process's place among all."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ds_decoupled
from ds_decoupled.collectives import together
from ds_decoupled.config import parse_block, read_json
from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.check import check_settings
from ds_decoupled.settings.table import batch_sizes
from run.arguments import DEFAULT_FOLDER, check_run_arguments
from run.monitors import report_to
from run.processes import pipe_position
from run.rates import parameter_groups


def read_config(path: str | None) -> dict[str, Any]:
    """A DeepSpeed configuration in any form that DeepSpeed takes, looked at before any data are; a peak rate of ``"auto"`` is
    filled in later."""
    if path is None:
        raise ConfigError("--deepspeed_config", path, "a DeepSpeed JSON file is needed", "See ds_configs/")
    try:
        config = read_json(path)
    except ConfigError as error:
        _, value, allowed, hint = error.fields
        raise ConfigError("--deepspeed_config", value, allowed, f"{hint} See ds_configs/") from error
    block = parse_block(config)
    check_settings(_without_auto(config), decoupled=block is not None and not block.is_plain_backprop)
    # Without a block it is DeepSpeed's own 1F1B, and so is this method, whose engine answers what recipes ask of every engine.
    return config if block is not None else config | {"decoupled": {"method": "backprop"}}


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    optimizer = config.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    if not isinstance(optimizer, dict) or not isinstance(params, dict) or params.get("lr") != "auto":
        return config
    return config | {"optimizer": optimizer | {"params": {k: v for k, v in params.items() if k != "lr"}}}


@dataclass(frozen=True)
class Setup:
    """What is known before any data: the configuration, and this process's place among all.

    Attributes:
        config: DeepSpeed's; recipes write the peak learning rate into it.
        pipe_ranks, pipe_rank: P, and which of them this is.
        replicas, replica: pipelines that share the data, and which of them this is.
        micro_batch: samples of a micro-batch of one replica.
        k: micro-batches per update.
    """

    config: dict[str, Any]
    pipe_ranks: int
    pipe_rank: int
    replicas: int
    replica: int
    micro_batch: int
    k: int

    @staticmethod
    def of(args: argparse.Namespace) -> Setup:
        """Raises :class:`ConfigError` for settings that cannot work."""
        config = report_to(read_config(args.deepspeed_config), args.report_to, DEFAULT_FOLDER / "logs")
        together(lambda: check_run_arguments(args, config))
        pipe_ranks, pipe_rank, replicas, replica = pipe_position(args.pipe_ranks)
        return Setup(config, pipe_ranks, pipe_rank, replicas, replica, *batch_sizes(config, replicas))

    @property
    def holds_data(self) -> bool:
        """Whether this is a rank of the first or the last stage: only these read data."""
        return self.pipe_rank in (0, self.pipe_ranks - 1)

    @property
    def update_samples(self) -> int:
        """Samples of one update, over all replicas."""
        return self.micro_batch * self.k * self.replicas

    def check_taught(self, updates: int) -> None:
        """A run of so many updates goes on behind the lessons of its heads, if they have any.

        Raises:
            ConfigError: if it does not, so that stages that learn from heads would learn nothing.
        """
        block = parse_block(self.config)
        teaching = None if block is None else block.head_teaching
        if teaching is not None and updates <= teaching.updates:
            raise ConfigError("decoupled.head_teaching.updates", teaching.updates, f"the run has {updates} updates, and in "
                              "none of them a stage would learn from its head", "Train for longer, or teach for shorter.")

    @property
    def counted_in(self) -> dict[str, int]:
        """Units that a run's progress is counted in: a checkpoint goes on with the same ones."""
        return {"gradient_accumulation_steps": self.k, "samples of a micro-batch, over all replicas,":
                self.micro_batch * self.replicas}

    def engine(self, layers: list[Any], *, loss_fn: Callable[..., Any], seed: int, schedule: Any, sample_input: Any) -> Any:
        """The engine that trains ``layers``; ``schedule`` counts updates, unless the JSON has a scheduler."""
        model = ds_decoupled.DecoupledPipelineModule(
            layers, config=copy.deepcopy(self.config), num_stages=self.pipe_ranks, loss_fn=loss_fn, base_seed=seed,
            sample_input=sample_input)
        engine, _, _, _ = ds_decoupled.initialize(
            model=model, config=copy.deepcopy(self.config), model_parameters=parameter_groups(model),
            lr_scheduler=None if "scheduler" in self.config else schedule)
        return engine
