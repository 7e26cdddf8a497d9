"""DeepSpeed's face of a decoupled pipeline: construction, ``train_batch``, ``eval_batch``, ``drain``, ``save``, ``load``.

A micro-batch's way, and the room that knows each step (docs/architecture.md has the whole drawing)::

    data iterator --feed--> network's queue of raw batches
    runners/   decides which action is due, and carries it out
    stages/    a worker takes the message from its queue, its stage acts, what comes of it goes to the next queue
    network    moves what lies at a rank's ends to the neighbours, and takes in what they send
    optim/     the stage steps by its own optimizer after its own k-th gradient
    watchers/  are told of all of it
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_decoupled import compat
from ds_decoupled.checkpoint import Parts, load_checkpoint, save_checkpoint
from ds_decoupled.collectives import error_of_group, gather, together
from ds_decoupled.config import DecoupledConfig
from ds_decoupled.errors import PeerError, one_line
from ds_decoupled.evaluation import evaluate
from ds_decoupled.feed import Feed, MicroBatch
from ds_decoupled.instructions import instruction_map
from ds_decoupled.links import CODECS
from ds_decoupled.losses import Losses
from ds_decoupled.network import Network
from ds_decoupled.optim import (
    StageOptimizer,
    StageOptimizers,
    build_optimizers,
    build_schedulers,
    lr_divisor,
    without_optimizers,
)
from ds_decoupled.passes import Passes
from ds_decoupled.runners import RUNNERS
from ds_decoupled.schedules import Placement, Plan
from ds_decoupled.settings.placed import check_local
from ds_decoupled.stages import Stage, check_reconstruct
from ds_decoupled.stages.autocast import autocast_of, refuse_ambient
from ds_decoupled.stages.building import build_stages, seeds_of
from ds_decoupled.stages.compiled import outlives_updates
from ds_decoupled.stages.head_builder import build_heads
from ds_decoupled.stages.worker import Worker
from ds_decoupled.start_checks import check_experts, check_loss, check_sparse, check_zero
from ds_decoupled.step_log import StepLog
from ds_decoupled.summary import summarize
from ds_decoupled.watchers import Breakdown, GradientTracker, Watcher


class DecoupledPipelineEngine(compat.PipelineEngineBase):
    """A pipeline engine whose stages are decoupled as the JSON's ``decoupled`` block says.

    Made by :func:`ds_decoupled.initialize`. ``train_batch``, ``eval_batch``, ``save_checkpoint`` and ``load_checkpoint`` are
    DeepSpeed's; :meth:`drain` finishes what is in flight. Only the first stage's ranks need a data iterator.

    Attributes:
        stages: this rank's stages, by number; ``stage_optimizers`` and ``workers`` likewise.
        placement: all stages and their ranks.
        plan: who does what, when.
        runner: where this rank is in it.
        watchers: who looks on; see :meth:`watch`.
    """

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
        self.losses = Losses(self.device, self._replicas, lambda: self.module.get_additional_losses())
        self._make_workers()
        self._hooks = compat.hooks_of(self.module)  # DeepSpeed's own

    # -- how it is made ---------------------------------------------------------------------------------------------------

    def _make_stages(self) -> None:
        """Stages, the plan, the links and the heads, in this order: a head is built from what its stage gives. A collective
        call."""
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
                              farthest=block.losses == "farthest", family=axes.gradient)
        # Where nothing comes back from the next rank, nothing else keeps this one from running ahead of it.
        queue = block.queue + axes.hops[0] if axes.window == 1 else None
        self.network = Network(grid, self.placement, rank, self.device, CODECS[block.codec], block.timeout,
                               track=block.track_gradients > 0, queue=queue)
        self.passes = Passes(self.network, self.stages)
        dtype = torch.bfloat16 if self.bfloat16_enabled() else torch.float32
        self._refreshes = build_heads(self.stages, self.passes, module, block, grid=grid, seeds=self.seeds,
                                      micro_batch=self.train_micro_batch_size_per_gpu(), dtype=dtype)

    def _make_workers(self) -> None:
        """What acts, and who decides when."""
        block, top = self.decoupled, max(self.stages)
        breakdown = Breakdown(self.global_rank, self.stage_id) if self.wall_clock_breakdown() else None
        tracker = GradientTracker(self.passes, block.track_gradients) if block.track_gradients else None
        self.watchers: list[Watcher] = [watcher for watcher in (breakdown, tracker) if watcher is not None]
        self.workers = {s: Worker(stage, self.stage_optimizers[s], self.network.queues(s),
                                  self.losses.add if s == top else None, self.watchers,
                                  None if block.stop_after is None else block.stop_after[s])
                        for s, stage in self.stages.items()}
        self.runner = RUNNERS[self.axes.pace](
            self.plan, self.stage_id, workers=self.workers, network=self.network, watchers=self.watchers, flush=self.axes.flush,
            execute=self.run_schedule, fetch=self._fetch if self.is_first_stage() else None)
        self.instruction_map = instruction_map(self.runner.act)
        self._set_k()
        self.step_log = StepLog(self, breakdown)

    def _set_k(self) -> None:
        """What depends on the micro-batches of an update."""
        for index, stage in self.stages.items():
            stage.scale = 1 / self.plan.k
            stage.returns_input = index - 1 in self.plan.wants_output
            stage.weights.lead = self.plan.ticks.delay(index) / self.plan.k

    def configure_optimizers(self, client_optimizer: Any, model_parameters: Any) -> None:
        """One optimizer per stage, of the client's kind or the JSON's."""
        self._make_stages()
        together(lambda: build_optimizers(self, self.stages, self._optimizers, client_optimizer, list(model_parameters),
                                          self.lr_divisor))
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

    def watch(self, watcher: Watcher) -> None:
        """From now on ``watcher`` is told of every action of this rank; where it makes collective calls, of all ranks."""
        self.watchers.append(watcher)

    # -- training ---------------------------------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Feed k new micro-batches and do all that is due meanwhile.

        Args:
            data_iter: yields ``(inputs, labels)`` (:mod:`ds_decoupled.feed`); needed on the first stage's ranks alone.

        Returns:
            The mean loss of the micro-batches whose loss (on the rank of the last stage) or whose gradient (elsewhere)
            this rank dealt with in this call, averaged over data-parallel replicas; NaN if there was none, as while the
            pipeline fills. No rank waits for another to report it.

        Raises:
            StopIteration: if the data ended, on every rank, though not in the same call. What is in flight stays there:
                :meth:`drain` finishes it, and training can go on with new data.
            BatchError: likewise, for a micro-batch that cannot be trained on, or whatever the iterator raised; on ranks
                that read no data a :class:`PeerError` that says the same.
            PeerError: if another rank failed; it says why.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("train_batch() requires gradients enabled. Use eval_batch() instead.")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        start = time.perf_counter()
        self._optimizers.before_batch()
        with self._training("train_batch"):
            if self.runner.end is None:
                for refresh in self._refreshes:
                    refresh.before_call(self.global_steps)
            end = self.runner.train()
            self._after_call()
            loss = self.losses.mean()
        self.step_log.seconds += time.perf_counter() - start
        if end is not None:
            raise end.error or StopIteration(f"the data ended before micro-batch {end.micro_batch}; drain() finishes what is "
                                             "in flight")
        self.step_log.after_batch(self.losses, loss)
        return loss

    def drain(self) -> Tensor:
        """Finish every micro-batch in flight, on all ranks; every stage then has made the same number of updates.

        Returns:
            The mean loss of what was finished, as :meth:`train_batch` gives it.
        """
        with self._training("drain"):
            self.runner.drain()
            self._after_call()
            return self.losses.mean()

    @property
    def in_flight(self) -> int:
        """Micro-batches that have been fed and are not yet through every stage."""
        return self.runner.in_flight

    @contextmanager
    def _training(self, call: str) -> Iterator[None]:
        """Within a call that trains: layers are in training mode, no loss is known, failures are told."""
        refuse_ambient(self.device, call)
        with self._failure_told():
            self._check_hooks()
            self.module.train()
            for stage in self.stages.values():
                stage.train_mode()
            self.losses.clear()
            yield

    def _after_call(self) -> None:
        for watcher in self.watchers:
            watcher.after_call(self.runner.through)

    def _check_hooks(self) -> None:
        if compat.hooks_of(self.module) != self._hooks:
            raise RuntimeError("a hook was registered on the pipeline module, and stages call its layers one by one, never the "
                               "module: register it on a layer")

    @contextmanager
    def _failure_told(self) -> Iterator[None]:
        """Within, what fails here is told to the other ranks, which would only find this one gone."""
        try:
            yield
        except PeerError as error:
            self.network.tell_failure(error.rank, error.reason)
            raise
        except Exception as error:
            self.network.tell_failure(self.stage_id, one_line(error))
            raise
        except BaseException:  # Ctrl-C reaches every rank
            self.network.failed = True
            raise

    def _fetch(self, count: int) -> list[MicroBatch] | Exception:
        """The next micro-batches; or why there are none, on all replicas."""
        fetched: list[MicroBatch] = []
        error: Exception | None = None
        try:
            for _ in range(count):
                fetched.append(self.feed.next(self.data_iterator, self.batch_fn, "train_batch"))
        except Exception as failure:
            error = failure
        return error_of_group(error, self._replicas, self.device) or fetched

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch size by changing k; only with nothing in flight, see :meth:`drain`.

        Raises:
            RuntimeError: if micro-batches are in flight, whose updates were planned with the old k.
            ValueError: if the size is not a multiple of micro-batch size times replicas.
        """
        if not self.runner.at_rest:
            raise RuntimeError("set_train_batch_size() needs an empty pipeline: call drain() first")
        super().set_train_batch_size(train_batch_size)
        self.plan = self.runner.plan = replace(self.plan, k=self.micro_batches)
        self._set_k()

    # -- evaluation -------------------------------------------------------------------------------------------------------

    def eval_batch(self, data_iter: Iterator[Any], return_logits: bool = False, compute_loss: bool = True,
                   reduce_output: str | None = "avg", bcast_loss: bool = True, num_micro_batches: int | None = None) -> Any:
        """Evaluate ``num_micro_batches`` (by default k) micro-batches with the weights as they are.

        Works at any time; what is in flight is left untouched. Micro-batches may have any size. Arguments and result are
        DeepSpeed's; only the first stage's ranks need the iterator. With ``reduce_output=None`` the ranks of the last stage
        get the list of losses, the others None.

        Raises:
            StopIteration, BatchError, PeerError: as :meth:`train_batch`, on every rank in the same call.
        """
        refuse_ambient(self.device, "eval_batch")
        count = self.micro_batches if num_micro_batches is None else num_micro_batches
        if count < 1:
            raise ValueError(f"eval_batch(num_micro_batches={num_micro_batches}): at least 1 is needed")
        with self._failure_told():
            self._check_hooks()
            self.module.eval()
            source = partial(self.feed.next, data_iter, self.batch_fn, "eval_batch")
            results, error = evaluate(self.passes, count, source, ask_heads=self.decoupled.ensemble, compute_loss=compute_loss)
            error = error_of_group(error, self._replicas, self.device)
        if error is not None:
            raise error
        value = logits = None
        if self.is_last_stage():
            value = self.reduce_outputs([loss for loss, _ in results], reduce_output, count)
            logits = results[-1][1]
        if compute_loss and reduce_output is not None and (bcast_loss or self.monitor.enabled):
            value = self.broadcast_from_last(value)
            if self.global_rank == 0 and self.monitor.enabled:
                self.monitor.write_events([("Train/Samples/eval_loss", value.item(), self.global_samples)])
        return (value, logits) if return_logits else value

    # -- checkpoints and reports ------------------------------------------------------------------------------------------

    @property
    def _parts(self) -> Parts:
        return Parts(self.decoupled.method, self.axes, self.placement, self.seeds, self.workers, self.network, self.runner,
                     self.watchers)

    def save_checkpoint(self, save_dir: str, tag: Any = None, client_state: dict[str, Any] | None = None,
                        save_latest: bool = True, exclude_frozen_parameters: bool = False) -> bool:
        """Save weights (DeepSpeed's layer files), optimizers and all that is in flight. All ranks must call it."""
        return save_checkpoint(self, self._parts, save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)

    def load_checkpoint(self, load_dir: str, tag: Any = None, load_module_strict: bool = True,
                        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True,
                        load_module_only: bool = False, custom_load_fn: Any = None) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint, on the same or another number of pipe ranks; training goes on as if it had never stopped.

        Returns:
            The checkpoint's path and the client's state; ``(None, None)`` where there is none.
        """
        return load_checkpoint(self, self._parts, load_dir, tag, load_module_strict, load_optimizer_states,
                               load_lr_scheduler_states, load_module_only)

    def stage_metrics(self) -> list[dict[str, float]]:
        """Each stage's mean loss and accuracy since the last call, by its own head; all ranks must call it. With a global
        gradient only the last stage has a loss, and the list is empty."""
        found = {s: metrics for part in gather({s: stage.take_metrics() for s, stage in self.stages.items()})
                 for s, metrics in part.items()}
        return [metrics for _, metrics in sorted(found.items()) if metrics is not None]

    def decoupled_summary(self) -> dict[str, Any]:
        """What the run did, over all ranks (all must call it): delays, records, bytes and messages sent, tracked gradients."""
        return summarize(self.decoupled.method, self.plan, self.axes.hops, self.axes.flush, self.workers, self.network,
                         self.watchers, sum(refresh.bytes_sent for refresh in self._refreshes))
