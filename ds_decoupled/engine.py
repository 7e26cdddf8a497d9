"""The engine: runs a plan on DeepSpeed's pipeline engine.

One micro-batch's way: the data iterator (:meth:`_load`), each stage's forward (:meth:`_forward`), loss and backward on the
last stage (:meth:`_loss`), each stage's backward (:meth:`_backward`), each stage's own update (:meth:`_update`); between
ranks by :mod:`ds_decoupled.links`. What happens in which order is the plan's business (:mod:`ds_decoupled.schedules`), how a
stage goes forward and back is the stage's (:mod:`ds_decoupled.stages`).
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor

from ds_decoupled import compat
from ds_decoupled import instructions as ins
from ds_decoupled.breakdown import Breakdown
from ds_decoupled.checkpoint import load_checkpoint, save_checkpoint
from ds_decoupled.collectives import first_reason, from_rank, gather, together
from ds_decoupled.config import DecoupledConfig
from ds_decoupled.errors import PeerError, one_line
from ds_decoupled.feed import Feed, MicroBatch
from ds_decoupled.links import CODECS, Message
from ds_decoupled.local_losses import LocalLosses, check_local
from ds_decoupled.network import Network
from ds_decoupled.nn.heads import add_up, ensemble
from ds_decoupled.optim import (
    StageOptimizer,
    StageOptimizers,
    build_optimizers,
    build_schedulers,
    lr_divisor,
    without_optimizers,
)
from ds_decoupled.schedules import Placement, Plan
from ds_decoupled.stages import LayerSeeds, LocalStage, Stage, check_reconstruct
from ds_decoupled.stages.autocast import autocast_of, refuse_ambient
from ds_decoupled.stages.compiled import check_compiler, compile_layers, outlives_updates
from ds_decoupled.stages.randomness import drawn_seed
from ds_decoupled.start_checks import check_experts, check_loss, check_sparse, check_zero
from ds_decoupled.tensors import Gradients, Tensors
from ds_decoupled.tracker import GradientTracker


class DecoupledPipelineEngine(compat.PipelineEngineBase):
    """A pipeline engine whose stages are decoupled as the JSON's ``decoupled`` block says.

    Made by :func:`ds_decoupled.initialize`. ``train_batch``, ``eval_batch``, ``save_checkpoint`` and ``load_checkpoint`` are
    DeepSpeed's; :meth:`drain` finishes what is in flight. Only the first stage's ranks need a data iterator.

    Attributes:
        stages: this rank's stages, by number.
        placement: all stages and their ranks.
        plan: who does what, when.
    """

    def __init__(self, *args: Any, decoupled: DecoupledConfig, placement: Placement, **kwargs: Any) -> None:
        self.decoupled = decoupled
        self.axes = decoupled.axes()
        self.placement = placement
        check_local(decoupled, placement)
        compat.check_runs_by_layers(kwargs["model"])
        self.stages: dict[int, Stage] = {}
        self.local: LocalLosses | None = None
        self.stage_optimizers: dict[int, StageOptimizer] = {}
        self._optimizers = StageOptimizers(self.stage_optimizers, shared=(self, kwargs.get("model")))
        check_experts(kwargs["model"])
        check_zero(kwargs["config_class"], kwargs.get("optimizer"))
        super().__init__(*args, **kwargs)
        if not self.stages:  # DeepSpeed configures an optimizer only where it is given one
            self._make_stages()
            without_optimizers(self, self._optimizers)
        self.optimizer = self.basic_optimizer = self._optimizers
        last = placement.stages - 1
        told = [told for part in gather({s: (stage.wants_output, stage.reversible, stage.layer_names)
                                                        for s, stage in self.stages.items()}) for told in part.items()]
        self._optimizers.find_out()
        check_reconstruct(any(reversible for _, (_, reversible, _) in told), self.axes, [names for _, (_, _, names) in told])
        self.plan = Plan.make(placement, hops=self.axes.hops, k=self.micro_batches, recover=self.axes.recover,
                              flush=self.axes.flush, split_backward=decoupled.split_backward,
                              wants_output=frozenset(s for s, (wants, _, _) in told if wants), window=self.axes.window,
                              farthest=decoupled.losses == "farthest")
        self.network = Network(self.grid, self.plan, self.stage_id, self.device, CODECS[decoupled.codec], decoupled.timeout,
                               track=decoupled.track_gradients > 0,
                               queue=decoupled.queue + self.axes.hops[0] if self.axes.window == 1 else None)
        self._set_leads()
        self.tracker = GradientTracker(self, decoupled.track_gradients) if decoupled.track_gradients else None
        self.holds_loss = last in self.stages
        self._top = max(self.stages)

        self._first_micro_batch = 0  # of this run, that is since the start or the last drain
        self._fed = 0  # micro-batches of this run
        self._tick = 0  # the next one of this run
        self._end: int | None = None  # the micro-batch at which the data ended, once that is known
        self._end_error: Exception | None = None  # why, where it was not the data's own end
        self.feed = Feed(self.device, needs_labels=self.module.loss_fn is not None)
        self._batches: deque[MicroBatch] = deque()
        self._losses: list[Tensor] = []
        self._hooks = compat.hooks_of(self.module)  # DeepSpeed's own
        self.train_seconds = 0.0
        self.breakdown = Breakdown(self.global_rank, self.stage_id) if self.wall_clock_breakdown() else None
        if self.breakdown is not None:
            self.instruction_map = self.breakdown.timed(self.instruction_map)

    # -- optimizers ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self, client_optimizer: Any, model_parameters: Any) -> None:
        """One optimizer per stage, of the client's kind or the JSON's."""
        self._make_stages()
        together(lambda: build_optimizers(self, self._optimizers, client_optimizer, list(model_parameters)))
        check_sparse(self)

    def lr_divisor(self, stage: int, updates: int) -> float:
        """What a stage's rate is divided by; its delay in updates changes with k."""
        factor = 1.0 if self.decoupled.stage_lr is None else self.decoupled.stage_lr[stage]
        if factor == 0:
            return math.inf  # a rate of 0, whatever the scheduler says
        return lr_divisor(self.plan.ticks.delay(stage) / self.plan.k, updates, self.decoupled.lr_by_delay) / factor

    def configure_lr_schedulers(self) -> None:
        """One LR scheduler per stage, which counts that stage's updates."""
        together(lambda: build_schedulers(self, self._optimizers))

    @property
    def lr_scheduler(self) -> Any:
        """The scheduler that was given, brought to where this rank's topmost stage is; or that stage's own. One that is
        assigned drives every stage by its own updates, None lets the rates stay (on this rank: assign it on all)."""
        return self._optimizers.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self._optimizers.set_lr_scheduler(scheduler)

    def _make_stages(self) -> None:
        """This rank's stages, with their heads. A collective call."""
        # A plain module's base_seed is a constant that nobody chose.
        chosen = self.module.base_seed if isinstance(self.module, compat.PipelineModuleBase) else None
        base = from_rank(0, drawn_seed()) if chosen is None else chosen
        self.seeds = LayerSeeds(base, self.mpu.get_data_parallel_rank(), self.device, compat.layer_seeding(self.module))
        together(self._build_stages)
        check_loss(self)
        if self.axes.window:
            self.local = LocalLosses(self)

    def _build_stages(self) -> None:
        rank = self.module.pipe_rank if hasattr(self.module, "pipe_rank") else self.mpu.get_pipe_parallel_rank()
        start = self.placement.rank_layer_bounds[rank]
        compiled = self.decoupled.compile_settings()
        if compiled is not None:
            check_compiler(compiled, self.device)
            compile_layers(self.module.forward_funcs, compiled, outlives_updates(self.axes))
        autocast = autocast_of(self, outlives_updates(self.axes), compiled is not None)
        for index in self.placement.stages_of(rank):
            layers = self.placement.layers_of(index)
            functions = self.module.forward_funcs[layers.start - start:layers.stop - start]
            puts_off = self.decoupled.split_backward and rank > 0 and index == self.placement.stages_of(rank)[0]
            args = (index, functions, layers.start, self.axes, index == self.placement.stages - 1, self.module.loss_fn,
                    self.seeds, autocast)
            self.stages[index] = self._local_stage(*args) if self.axes.window else Stage(*args, split_backward=puts_off)

    def _local_stage(self, index: int, *args: Any) -> LocalStage:
        return LocalStage(index, *args, head=None, window=self.axes.window, above=self.placement.stages - 1 - index,
                          farthest=self.decoupled.losses == "farthest")

    # -- training --------------------------------------------------------------------------------------------------------

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
        refuse_ambient(self, "train_batch")
        with self._failure_told():
            self._check_hooks()
            self._train_mode()
            if self.local is not None:
                self.local.before_batch(ended=self._end is not None)
            self._losses.clear()
            if self._end is None:
                self._fed += self.plan.k
                if self.is_first_stage():
                    self._fetch()
                self._run_ticks(self._tick + self.plan.k + (self.plan.ticks.drain if self.axes.flush else 0))
            end, error = self._end, self._end_error
            if self.axes.flush:
                self._start_run()
            loss = self._mean_loss()
        self.train_seconds += time.perf_counter() - start
        if error is not None:
            raise error
        if end is not None:
            raise StopIteration(f"the data ended before micro-batch {end}; drain() finishes what is in flight")
        self._after_batch(loss)
        return loss

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

    def _train_mode(self) -> None:
        """Layers train, but those of stages that have stopped."""
        self.module.train()
        for stage in self.stages.values():
            if isinstance(stage, LocalStage) and stage.stopped:
                stage.stop()

    def _fetch(self) -> None:
        """All of this call's micro-batches, before anything is done with the first: data that end leave no call half done."""
        first = self._first_micro_batch + self._fed - self.plan.k
        fetched: list[MicroBatch] = []
        error: Exception | None = None
        try:
            for _ in range(self.plan.k):
                fetched.append(self.feed.next(self.data_iterator, self.batch_fn, "train_batch"))
        except Exception as failure:
            error = failure
        error = self._error_of_replicas(error)
        if error is None:
            self._batches.extend(fetched)
        else:
            self._data_ended(first, None if isinstance(error, StopIteration) else error)

    def _error_of_replicas(self, error: Exception | None) -> Exception | None:
        """What this replica's data failed with, or another's, whose ranks would wait for this one's gradients or loss."""
        if not self.is_data_parallel:
            return error
        reason = first_reason(error, self.mpu.get_data_parallel_group(), self.device)
        if error is not None or reason is None:
            return error
        if reason.startswith(StopIteration.__name__):
            return StopIteration("the data of another replica ended")
        return PeerError(f"the data of another replica failed: {reason}", 0, reason)

    def _data_ended(self, micro_batch: int, error: Exception | None = None) -> None:
        """``micro_batch`` and those after it will not come, and why if not for the data's end; the next rank learns it at once.
        What came before goes its way."""
        if self._end is None:
            self._end, self._end_error = micro_batch, error
            self._fed = micro_batch - self._first_micro_batch
            reason = None if error is None else error.reason if isinstance(error, PeerError) else one_line(error)
            self.network.pass_on_end(micro_batch, reason)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch size by changing k; only with nothing in flight, see :meth:`drain`.

        Raises:
            RuntimeError: if micro-batches are in flight, whose updates were planned with the old k.
            ValueError: if the size is not a multiple of micro-batch size times replicas.
        """
        if self._tick:
            raise RuntimeError("set_train_batch_size() needs an empty pipeline: call drain() first")
        super().set_train_batch_size(train_batch_size)
        self.plan = replace(self.plan, k=self.micro_batches)
        self._set_leads()

    def _set_leads(self) -> None:
        """How many updates a stage makes between a forward pass and its backward pass."""
        for index, stage in self.stages.items():
            stage.weights.lead = self.plan.ticks.delay(index) / self.plan.k

    def _run_ticks(self, end: int) -> None:
        """Work through this rank's list up to tick ``end``."""
        self.network.expect(end, self._fed, self._first_micro_batch)
        schedule = ins.DecoupledSchedule(self.plan, self.stage_id, range(self._tick, end), self._fed, self._first_micro_batch)
        self.run_schedule(schedule)
        self._tick = end
        if self.tracker is not None:
            self.tracker.after_ticks()

    def _start_run(self) -> None:
        """Nothing is in flight: ticks count from 0 again, micro-batches go on."""
        self._first_micro_batch += self._fed
        self._fed = self._tick = 0
        self._end = self._end_error = None
        self.network.start_run()

    def drain(self) -> Tensor:
        """Finish every micro-batch in flight, on all ranks; every stage then has made the same number of updates.

        Returns:
            The mean loss of what was finished, as :meth:`train_batch` gives it.
        """
        refuse_ambient(self, "drain")
        with self._failure_told():
            self._train_mode()
            self._losses.clear()
            self._run_ticks(max(self._tick, self._fed + self.plan.ticks.drain))
            self.network.flush()
            self._start_run()
            return self._mean_loss()

    @property
    def in_flight(self) -> int:
        """Micro-batches that have been fed and are not yet through every stage."""
        return max(0, min(self._fed, self._fed + self.plan.ticks.drain - self._tick))

    def _mean_loss(self) -> Tensor:
        if not self._losses:
            return torch.full((), float("nan"), device=self.device)
        losses = torch.stack([value.float().reshape(-1) for value in self._losses]).mean(0)
        if self.is_data_parallel:
            dist.all_reduce(losses, group=self.mpu.get_data_parallel_group())
            losses /= self.dp_world_size
        loss, *additional = losses.unbind()
        if additional:
            self.agg_additional_losses = OrderedDict(zip(self.module.get_additional_losses(), additional))
        return loss

    def _after_batch(self, loss: Tensor) -> None:
        """Count, log and monitor, as DeepSpeed does."""
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        self.agg_train_loss = loss
        if self.global_rank == 0 and self.monitor.enabled and self._losses:  # none, while the pipeline fills
            rates = self.get_lr()[:1]  # none on a rank with nothing to train
            self.monitor.write_events([("Train/Samples/train_loss", loss.item(), self.global_samples),
                                       *(("Train/Samples/lr", rate, self.global_samples) for rate in rates)])
        every = self.steps_per_print()
        if self.global_rank == 0 and every is not None and self.global_steps % every == 0:
            rate = self.train_batch_size() * self.global_steps / self.train_seconds
            shown = {"loss": loss, **(self.agg_additional_losses or {})} if self._losses else {}
            told = " ".join(f"{name}: {value.item():0.4f}" for name, value in shown.items()) or "loss: none yet"
            print(f"steps: {self.global_steps} {told} samples/sec: {rate:0.3f}", flush=True)
        if self.breakdown is not None and every is not None and self.global_steps % every == 0:
            print(self.breakdown.report(self.global_steps), flush=True)

    # -- instructions ------------------------------------------------------------------------------------------------------

    def _ended(self, micro_batch: int) -> bool:
        return self._end is not None and micro_batch >= self._end

    def _load(self, stage: int, micro_batch: int) -> None:
        if self._ended(micro_batch):
            return
        inputs, labels = self._batches.popleft()
        if self.tracker is not None:
            self.tracker.loaded(micro_batch, inputs, labels)
        self.network.activations[stage].send(Message(micro_batch, (inputs, labels)))

    def _forward(self, stage: int, micro_batch: int) -> None:
        if self._ended(micro_batch):
            return
        inputs, labels = self.network.activations[stage].recv(micro_batch, f"stage {stage}, forward").parts
        outputs = self.stages[stage].forward(micro_batch, inputs)
        self.network.activations[stage + 1].send(Message(micro_batch, (outputs, labels)))

    def _head(self, stage: int, micro_batch: int) -> None:
        if self._ended(micro_batch):
            return
        inputs, labels = self.network.activations[stage].recv(micro_batch, f"stage {stage}, forward").parts
        local = self._local(stage)
        result = local.head_forward(micro_batch, inputs, labels, 1 / self.plan.k)
        if stage == self._top:
            self._losses.append(result.loss)
        self.network.activations[stage + 1].send(Message(micro_batch, (result.outputs, labels)))
        self._pass_gradient(stage, micro_batch, result.grads, result.loss)

    def _relay(self, stage: int, micro_batch: int) -> None:
        if self._ended(micro_batch):
            return
        grads, _, loss = self.network.gradients[stage].recv(micro_batch, f"stage {stage}, a loss above").parts
        self._pass_gradient(stage, micro_batch, self._local(stage).relay(micro_batch, grads), loss)

    def _local(self, stage: int) -> LocalStage:
        local = self.stages[stage]
        assert isinstance(local, LocalStage)
        return local

    def _loss(self, stage: int, micro_batch: int) -> None:
        if self._ended(micro_batch):
            return
        inputs, labels = self.network.activations[stage].recv(micro_batch, f"stage {stage}, loss").parts
        if self.tracker is not None:
            self.tracker.begin(stage, micro_batch)
        result = self.stages[stage].loss_and_backward(micro_batch, inputs, labels, 1 / self.plan.k)
        loss = self._with_additional(result.loss) if stage == self.placement.stages - 1 else result.loss
        if stage == self._top or not self.axes.window:
            self._losses.append(loss)
        if stage + 1 < self.placement.stages:
            self.network.activations[stage + 1].send(Message(micro_batch, (result.outputs, labels)))
        self._after_backward(stage, micro_batch, result.inputs, result.grads, loss)

    def _with_additional(self, loss: Tensor) -> Tensor:
        """The loss, followed by the module's additional ones (:meth:`PipelineModule.get_additional_losses`) if it has any;
        they are reported, and nobody learns from them."""
        additional = self.module.get_additional_losses()
        if not additional:
            return loss
        return torch.stack([value.detach().float().reshape(()) for value in (loss, *additional.values())])

    def _backward(self, stage: int, micro_batch: int) -> None:
        if self._ended(micro_batch):
            return
        grads, outputs, loss = self.network.gradients[stage].recv(micro_batch, f"stage {stage}, backward").parts
        if self.tracker is not None:
            self.tracker.begin(stage, micro_batch)
        inputs, input_grads = self.stages[stage].backward(micro_batch, outputs, grads)
        if stage == self._top and (not self.axes.window or stage < self.plan.ticks.first_loss):
            self._losses.append(loss)
        self._after_backward(stage, micro_batch, inputs, input_grads, loss)

    def _after_backward(self, stage: int, micro_batch: int, inputs: Tensors, grads: Any, loss: Tensor) -> None:
        reconstruction = inputs if stage - 1 in self.plan.wants_output else None
        self._pass_gradient(stage, micro_batch, grads, loss, reconstruction)
        if self.stages[stage].deferred is None:
            self._gradients_complete(stage, micro_batch)

    def _pass_gradient(self, stage: int, micro_batch: int, grads: Gradients | None, loss: Tensor,
                       reconstruction: Tensors | None = None) -> None:
        """Down to the stage below, if there is one and it heeds it."""
        if stage > 0 and grads is not None:
            self.network.gradients[stage - 1].send(Message(micro_batch, (grads, reconstruction, loss)))

    def _gradients_complete(self, stage: int, micro_batch: int) -> None:
        """The micro-batch's gradients are in ``.grad``."""
        if self.tracker is not None:
            self.tracker.end(stage, micro_batch)
        self.stage_optimizers[stage].accumulate()

    def _update(self, stage: int, micro_batch: int) -> None:
        if self._ended(self._first_micro_batch + (micro_batch + 1) * self.plan.k - 1):
            return
        local = self.stages[stage]
        if isinstance(local, LocalStage) and local.stopped:
            return
        local.weights.before_update()
        self.stage_optimizers[stage].step()
        if self.local is not None:
            self.local.after_update(stage)

    def _send_activation(self, stage: int, micro_batch: int) -> None:
        if not self._ended(micro_batch):
            self.network.send_activation(stage, micro_batch)

    def _recv_activation(self, stage: int, micro_batch: int) -> None:
        end = self.network.recv_activation(stage, micro_batch)
        if end is not None:
            self._data_ended(*end)

    def _send_gradient(self, stage: int, micro_batch: int) -> None:
        if not self._ended(micro_batch):
            self.network.send_gradient(stage, micro_batch)

    def _recv_gradient(self, stage: int, micro_batch: int) -> None:
        if not self._ended(micro_batch):
            self.network.recv_gradient(stage, micro_batch)

    def _weight_gradients(self, stage: int, micro_batch: int) -> None:
        if not self._ended(micro_batch):
            self.stages[stage].finish_backward()
            self._gradients_complete(stage, micro_batch)

    instruction_map = {
        ins.Load: _load,
        ins.Forward: _forward,
        ins.ForwardLossBackward: _loss,
        ins.ForwardHead: _head,
        ins.Relay: _relay,
        ins.Backward: _backward,
        ins.BackwardRecompute: _backward,
        ins.BackwardReconstruct: _backward,
        ins.WeightGradients: _weight_gradients,
        ins.Update: _update,
        ins.SendActivation: _send_activation,
        ins.RecvActivation: _recv_activation,
        ins.SendGradient: _send_gradient,
        ins.RecvGradient: _recv_gradient,
        ins.SendReconstruction: _send_gradient,
        ins.RecvReconstruction: _recv_gradient,
    }

    # -- evaluation -----------------------------------------------------------------------------------------------------------

    def eval_batch(self, data_iter: Iterator[Any], return_logits: bool = False, compute_loss: bool = True,
                   reduce_output: str | None = "avg", bcast_loss: bool = True, num_micro_batches: int | None = None) -> Any:
        """Evaluate ``num_micro_batches`` (by default k) micro-batches with the weights as they are.

        Works at any time; what is in flight is left untouched. Micro-batches may have any size. Arguments and result are
        DeepSpeed's; only the first stage's ranks need the iterator. With ``reduce_output=None`` the ranks of the last stage
        get the list of losses, the others None.

        Raises:
            StopIteration, BatchError, PeerError: as :meth:`train_batch`, on every rank in the same call.
        """
        refuse_ambient(self, "eval_batch")
        count = self.micro_batches if num_micro_batches is None else num_micro_batches
        if count < 1:
            raise ValueError(f"eval_batch(num_micro_batches={num_micro_batches}): at least 1 is needed")
        with self._failure_told(), torch.no_grad():
            self._check_hooks()
            self.module.eval()
            self.network.expect_evaluation(count)
            results, error = self._evaluate_all(count, data_iter, compute_loss)
            self.network.flush("evaluation")  # this may be the last that the process does
        if error is not None:
            raise error
        value = logits = None
        if self.holds_loss:
            value = self.reduce_outputs([loss for loss, _ in results], reduce_output, count)
            logits = results[-1][1]
        if compute_loss and reduce_output is not None and (bcast_loss or self.monitor.enabled):
            value = self.broadcast_from_last(value)
            if self.global_rank == 0 and self.monitor.enabled:
                self.monitor.write_events([("Train/Samples/eval_loss", value.item(), self.global_samples)])
        return (value, logits) if return_logits else value

    def _evaluate_all(self, count: int, data_iter: Iterator[Any], compute_loss: bool) -> tuple[list[Any], Exception | None]:
        """What this rank's stages make of each micro-batch, up to the end of the data or an error in them."""
        results: list[Any] = []
        error: Exception | None = None
        for micro_batch in range(count):
            parts: tuple[Any, ...] | None = None
            if self.is_first_stage():
                try:
                    parts = self.feed.next(data_iter, self.batch_fn, "eval_batch")
                except StopIteration:
                    error = StopIteration(f"the evaluation data ended before micro-batch {micro_batch}")
                except Exception as failure:
                    error = failure
            else:
                parts, error = self.network.recv_evaluation(micro_batch)
            if parts is None:
                assert error is not None
                self.network.end_evaluation(micro_batch, error)
                break
            results.append(self._evaluate(micro_batch, parts, compute_loss))
        return results, self._error_of_replicas(error)

    def _evaluate(self, micro_batch: int, parts: tuple[Any, ...], compute_loss: bool) -> Any:
        """One micro-batch through this rank's stages; on the last one ``(loss, outputs)``."""
        x, labels, *votes = parts
        for stage in self.stages.values():
            x = stage.plain_forward(micro_batch, x)
            votes += self._votes(stage, x)
        if self.holds_loss:
            x = ensemble(votes, x) if votes and isinstance(x, Tensor) else x
            loss = self.stages[self._top].loss(x, labels) if compute_loss else x
            return loss, x
        self.network.send_evaluation(Message(micro_batch, (x, labels, *add_up(votes))))
        return None

    def _votes(self, stage: Stage, outputs: Tensors) -> list[Tensor]:
        """What the stage's head says, where heads are asked."""
        return [stage.vote(outputs)] if self.decoupled.ensemble and isinstance(stage, LocalStage) and stage.head else []

    # -- checkpoints and reports ----------------------------------------------------------------------------------------------

    def save_checkpoint(self, save_dir: str, tag: Any = None, client_state: dict[str, Any] | None = None,
                        save_latest: bool = True, exclude_frozen_parameters: bool = False) -> bool:
        """Save weights (DeepSpeed's layer files), optimizers and all that is in flight. All ranks must call it."""
        return save_checkpoint(self, save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)

    def load_checkpoint(self, load_dir: str, tag: Any = None, load_module_strict: bool = True,
                        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True,
                        load_module_only: bool = False, custom_load_fn: Any = None) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint, on the same or another number of pipe ranks; training goes on as if it had never stopped.

        Returns:
            The checkpoint's path and the client's state; ``(None, None)`` where there is none.
        """
        return load_checkpoint(self, load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states,
                               load_module_only)

    def stage_metrics(self) -> list[dict[str, float]]:
        """Each stage's mean loss and accuracy since the last call, by its own head; all ranks must call it. With a global
        gradient only the last stage has a loss, and the list is empty."""
        return self.local.metrics() if self.local is not None else []

    def decoupled_summary(self) -> dict[str, Any]:
        """What the run did, over all ranks (all must call it): delays, records, bytes and messages sent, tracked gradients."""
        local = {
            "records": {s: stage.peak_in_flight for s, stage in self.stages.items()},
            "updates": {s: stage.updates for s, stage in self.stage_optimizers.items()},
            "bytes": self.network.bytes_sent() + (self.local.bytes_sent if self.local is not None else 0),
            "messages": self.network.messages_sent(),
            "held": self.network.held(),
            "tracked": self.tracker.results if self.tracker is not None else [],
            "seconds": self.breakdown.total if self.breakdown is not None else None,
        }
        parts = gather(local)
        by_stage = {name: [value for _, value in sorted({s: v for p in parts for s, v in p[name].items()}.items())]
                    for name in ("records", "updates")}
        ticks = self.plan.ticks
        return {"method": self.decoupled.method, "stages": self.placement.stages, "hops": list(self.axes.hops),
                "delays": [ticks.delay(s) for s in range(ticks.stages)] if not self.axes.flush else [0] * ticks.stages,
                "peak_records_in_flight": by_stage["records"], "updates": by_stage["updates"],
                "held": [p["held"] for p in parts],
                "bytes_sent": sum(p["bytes"] for p in parts), "messages_sent": sum(p["messages"] for p in parts),
                "stage_layers": [list(self.placement.layers_of(s)) for s in range(self.placement.stages)],
                "rank_stages": [list(self.placement.stages_of(r)) for r in range(self.placement.ranks)],
                "gradient_tracker": sorted((row for p in parts for row in p["tracked"]),
                                           key=lambda row: (row["micro_batch"], row["stage"])),
                **({"seconds_by_action": [p["seconds"] for p in parts]} if self.breakdown is not None else {})}

