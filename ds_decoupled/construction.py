"""How a decoupled engine is made, piece by piece, inside DeepSpeed's own construction of a pipeline engine.

::

    DeepSpeed makes the module's groups, puts it on its device
      configure_optimizers -> stages -> plan -> links -> heads or AuxNet -> optimizers
      configure_lr_schedulers
    workers -> runner
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ds_decoupled import compat
from ds_decoupled.collectives import gather, together
from ds_decoupled.config import DecoupledConfig
from ds_decoupled.feed import Feed
from ds_decoupled.instructions import instruction_map
from ds_decoupled.links import codecs_of
from ds_decoupled.losses import Losses
from ds_decoupled.norm_statistics import NormStatistics
from ds_decoupled.optim import (
    StageOptimizer,
    StageOptimizers,
    build_optimizers,
    build_schedulers,
    lr_divisor,
    without_optimizers,
)
from ds_decoupled.passes import Passes
from ds_decoupled.runners import runner_of
from ds_decoupled.schedules import Placement, Plan
from ds_decoupled.settings.placed import check_local
from ds_decoupled.stages import Stage
from ds_decoupled.stages.autocast import autocast_of
from ds_decoupled.stages.auxiliary import AuxiliaryStage
from ds_decoupled.stages.auxnet_builder import build_auxnet
from ds_decoupled.stages.building import build_stages, seeds_of
from ds_decoupled.stages.compiled import outlives_updates
from ds_decoupled.stages.head_builder import build_heads
from ds_decoupled.stages.worker import Worker
from ds_decoupled.start_checks import check_experts, check_loss, check_reconstruct, check_sparse, check_zero
from ds_decoupled.step_log import StepLog
from ds_decoupled.watchers import AuxNetCost, Breakdown, GradientTracker, Watcher


class ConstructedEngine(compat.PipelineEngineBase):
    """A pipeline engine with all that :class:`~ds_decoupled.DecoupledPipelineEngine` works with."""

    def __init__(self, *args: Any, decoupled: DecoupledConfig, placement: Placement, **kwargs: Any) -> None:
        self.decoupled, self.axes, self.placement = decoupled, decoupled.axes(), placement
        check_local(decoupled, placement)
        compat.check_runs_by_layers(kwargs["model"])
        self.stages: dict[int, Stage] = {}
        self.stage_optimizers: dict[int, StageOptimizer] = {}
        self._optimizers = StageOptimizers(self.stage_optimizers, shared=(self, kwargs.get("model")))
        check_experts(kwargs["model"])
        check_zero(kwargs["config_class"], kwargs.get("optimizer"))
        super().__init__(*args, **kwargs)
        if not self.stages:  # DeepSpeed configures an optimizer only where it is given one
            self._make_stages()
            without_optimizers(self, self.stages, self._optimizers, self.lr_divisor)
        self.optimizer = self.basic_optimizer = self._optimizers
        self._optimizers.find_out()
        self.feed = Feed(self.device, needs_labels=self.module.loss_fn is not None)
        # Ranks that run free report what they have, and wait for no other's.
        reported_by = None if self.axes.pace == "free" else self._replicas
        self.losses = Losses(self.device, reported_by, lambda: self.module.get_additional_losses())
        self._make_workers()
        self._hooks = compat.hooks_of(self.module)  # DeepSpeed's own

    def _make_stages(self) -> None:
        """Stages, the plan, the links, and heads or an AuxNet, in this order: these are built from what stages give.

        A collective call."""
        module, grid, axes, block = self.module, self.mpu, self.axes, self.decoupled
        rank = grid.get_pipe_parallel_rank()
        self.seeds = seeds_of(module, grid, self.device)
        compiles = block.compile_settings() is not None
        autocast = partial(autocast_of, self, outlives_updates(axes), compiles)
        self.stages.update(together(lambda: build_stages(module, rank, self.placement, block, self.seeds, autocast)))
        check_loss(module.loss_fn, self.stages)
        told = {s: facts for part in gather({s: (stage.wants_output, stage.reversible, stage.layer_names)
                                             for s, stage in self.stages.items()}) for s, facts in part.items()}
        check_reconstruct(any(reversible for _, reversible, _ in told.values()), axes, [names for *_, names in told.values()])
        self.plan = Plan.make(self.placement, hops=axes.hops, k=self.gradient_accumulation_steps(), recover=axes.recover,
                              flush=axes.flush, split_backward=block.split_backward, window=axes.window,
                              wants_output=frozenset(s for s, (wants, *_) in told.items() if wants),
                              farthest=block.losses == "farthest", family=axes.gradient,
                              sweeps=block.sweeps)
        self._serial_plan = Plan.make(self.placement, hops=axes.hops, k=self.plan.k, recover=axes.recover, flush=True) \
            if axes.input == "auxnet" and block.auxnet.serial_from is not None else None
        replay = block.own_pace().replay if axes.input == "replay" else None
        self.network = runner_of(axes).network_class(
            grid, self.placement, rank, self.device,
            partial(codecs_of, forward=block.codec.forward, backward=block.codec.backward, vq=block.vq.model_dump()),
            block.timeout, self._queue(), beside=block.track_gradients > 0,
            seed=lambda: self.seeds.base, replay=replay,
            every_link=block.codec.every_link, memory=torch.device("cpu") if block.replay.memory == "host" else None)
        self.passes = Passes(self.network, self.stages)
        dtype = torch.bfloat16 if self.bfloat16_enabled() else torch.float32
        self._refreshes = build_heads(self.stages, self.passes, module, block, grid=grid,
                                      bounds=self.placement.stage_bounds, seeds=self.seeds,
                                      micro_batch=self.train_micro_batch_size_per_gpu(), dtype=dtype)
        build_auxnet(self.stages, self.passes, module, block, seeds=self.seeds, replicas=self.network.replicas,
                     micro_batch=self.train_micro_batch_size_per_gpu(), dtype=dtype)

    def _queue(self) -> int:
        """Messages that may be on their way to a neighbour."""
        if self.axes.window == 1:  # nothing comes back, so that nothing else keeps a rank from running ahead of the next
            return self.decoupled.queue + self.axes.hops[0]
        # The plan keeps neighbours within the longest delay of one another, so no more than delay + 1 messages (of each loss
        # that comes down, and in each sweep) can be waited for, with an announcement each. Half as many again is never in the
        # way, and bounds what is held where the machine is so busy that the backend is slow to say that a message was taken.
        plans = [plan for plan in (self.plan, self._serial_plan) if plan is not None]
        delay = max(plan.ticks.delay(s) for plan in plans for s in range(self.placement.stages))
        return 3 * (delay + 2) * max(1, self.axes.window - 1, self.plan.sweeps)

    def _make_workers(self) -> None:
        """What acts, and who decides when."""
        block, top = self.decoupled, max(self.stages)
        breakdown = Breakdown(self.global_rank, self.stage_id) if self.wall_clock_breakdown() else None
        tracker = GradientTracker(self.passes, block.track_gradients) if block.track_gradients else None
        auxiliary = {s: stage for s, stage in self.stages.items() if isinstance(stage, AuxiliaryStage)}
        cost = AuxNetCost(auxiliary) if auxiliary else None
        self._before_evaluation = [NormStatistics(self.passes, list(auxiliary.values()), block.auxnet.norm_batches)
                                   ] if auxiliary else []
        self.watchers: list[Watcher] = [watcher for watcher in (breakdown, tracker, cost) if watcher is not None]
        self.workers = {s: Worker(stage, self.stage_optimizers[s], self.network.queues(s),
                                  self.losses.add if s == top else None, self.watchers,
                                  None if block.stop_after is None else block.stop_after[s])
                        for s, stage in self.stages.items()}
        # Replicas whose threads run free have data of their own, and wait for nobody's.
        alike = None if self.axes.layerwise and self.axes.pace == "free" else self._replicas
        # The user may set another iterator or batch_fn between two calls.
        fetch = lambda count: self.feed.fetch(self.data_iterator, self.batch_fn, count, alike)  # noqa: E731
        self.runner = runner_of(self.axes)(
            self.plan, self.stage_id, workers=self.workers, network=self.network, watchers=self.watchers, flush=self.axes.flush,
            execute=self.run_schedule, fetch=fetch if self.is_first_stage() else None,
            pace=block.own_pace())
        for index, stage in self.stages.items():
            stage.returns_input = index - 1 in self.plan.wants_output
            stage.follow(self.stage_optimizers[index].part_of_peak)
            self.stage_optimizers[index].lesson = stage.lesson
        self.instruction_map = instruction_map(self.runner.act)
        self._set_k()
        self.step_log = StepLog(self, breakdown)

    def _set_k(self) -> None:
        """What depends on the micro-batches of an update."""
        for index, stage in self.stages.items():
            stage.scale = 1 / self.plan.k
            stage.weights.lead = self.plan.ticks.delay(index) / self.plan.k

    def configure_optimizers(self, client_optimizer: Any, model_parameters: Any) -> None:
        """One optimizer per stage, of the client's kind or the JSON's."""
        self._make_stages()
        block = self.decoupled
        head_lr = None if block.head_lr == 1 and block.head_teaching is None else block.head_lr
        together(lambda: build_optimizers(self, self.stages, self._optimizers, client_optimizer, list(model_parameters),
                                          self.lr_divisor, head_lr))
        check_sparse(self, self.stages, self.stage_optimizers)

    def configure_lr_schedulers(self) -> None:
        """One LR scheduler per stage, which counts that stage's updates."""
        together(lambda: build_schedulers(self, self._optimizers, self.decoupled.stage_schedulers))

    def lr_divisor(self, stage: int, updates: int) -> float:
        """What a stage's rate is divided by; its delay in updates changes with k."""
        factor = 1.0 if self.decoupled.stage_lr is None else self.decoupled.stage_lr[stage]
        if factor == 0:
            return math.inf  # a rate of 0, whatever the scheduler says
        return lr_divisor(self.plan.ticks.delay(stage) / self.plan.k, updates, self.decoupled.lr_by_delay) / factor

    @property
    def lr_scheduler(self) -> Any:
        """The scheduler that was given, brought to where this rank's topmost stage is; or that stage's own. One that is
        assigned drives every stage by its own updates, None lets the rates stay (on this rank: assign it on all)."""
        return self._optimizers.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self._optimizers.set_lr_scheduler(scheduler)

    @property
    def _replicas(self) -> Any:
        """The group of data-parallel replicas; None for one."""
        return self.mpu.get_data_parallel_group() if self.is_data_parallel else None
