"""DeepSpeed's face of a decoupled pipeline: ``train_batch``, ``eval_batch``, ``drain``, ``save``, ``load``.

A micro-batch's way through two ranks of one stage each (actions in dashes, queues in brackets; ``~`` is a channel)::

    rank 0:  iterator --feed--> [batch] --L--> [input 0] --F--> [output 0] --SA~
                                                                               ~--RA--> [input 1] --X--> loss    : rank 1
    rank 0:                        stage 0's .grad <--B-- [output gradient 0] <--RG~
                                             |                                 ~--SG-- [input gradient 1] <--X-- : rank 1
                                             `-- after its k-th: U, by the stage's own optimizer

``runners/`` decides which action is due and carries it out; ``stages/`` says what it does, ``network`` and ``links/`` move
what lies at a rank's ends, ``optim/`` steps, and ``watchers/`` are told of all of it. docs/architecture.md has the rooms.
"""

from __future__ import annotations

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
from ds_decoupled.collectives import error_of_group, gather
from ds_decoupled.construction import ConstructedEngine
from ds_decoupled.errors import PeerError, one_line
from ds_decoupled.evaluation import evaluate
from ds_decoupled.stages.autocast import refuse_ambient
from ds_decoupled.stages.means import mean_by_name
from ds_decoupled.summary import summarize
from ds_decoupled.watchers import Watcher


class DecoupledPipelineEngine(ConstructedEngine):
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
        full = self.axes.flush or self.runner.through > self.runner.first
        self._optimizers.before_batch()
        with self._training("train_batch"):
            if self.runner.end is None:
                self._enter_phase()
                for refresh in self._refreshes:
                    refresh.before_call(self.global_steps)
            end = self.runner.train()
            self._after_call()
            loss = self.losses.mean()
        self.step_log.took(time.perf_counter() - start, whole=full)
        if end is not None:
            raise end.error or StopIteration(f"the data ended before micro-batch {end.micro_batch}; drain() finishes what is "
                                             "in flight")
        self.step_log.after_batch(self.losses, loss, beside=lambda: self.runner.told() or self._lesson())
        return loss

    def _enter_phase(self) -> None:
        """Where generated inputs end (``auxnet.serial_from``), the stages go on as one network, by a plan of their own."""
        if self._serial_plan is None:
            return
        # The same on every rank: between two calls all stages have made as many updates.
        serial = all(stage.serial for stage in self.stages.values())
        plan = replace(self._serial_plan, k=self.plan.k) if serial else self.plan
        if self.runner.plan != plan:
            self.runner.drain()  # nothing is in flight, and ticks count anew
            self.runner.plan, self.runner.flush = plan, serial

    def _lesson(self) -> str:
        """Whether heads are taught, for the log."""
        settings, done = self.decoupled.head_teaching, self.stage_optimizers[min(self.stages)].updates
        return f"(heads are taught: {done} of {settings.updates})" if settings is not None and done <= settings.updates else ""

    def drain(self) -> Tensor:
        """Finish every micro-batch in flight, on all ranks; every stage then has made the same number of updates.

        Returns:
            The mean loss of what was finished, as :meth:`train_batch` gives it.
        """
        with self._training("drain"):
            self.runner.drain()
            self._after_call()
            self.step_log.restart()
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
        self.step_log.restart()

    # -- evaluation -------------------------------------------------------------------------------------------------------

    def eval_batch(self, data_iter: Iterator[Any], return_logits: bool = False, compute_loss: bool = True,
                   reduce_output: str | None = "avg", bcast_loss: bool = True, num_micro_batches: int | None = None,
                   from_stage: int = 0) -> Any:
        """Evaluate ``num_micro_batches`` (by default k) micro-batches with the weights as they are.

        Works at any time; what is in flight is left untouched. Micro-batches may have any size. Arguments and result are
        DeepSpeed's; only the first stage's ranks need the iterator. With ``reduce_output=None`` the ranks of the last stage
        get the list of losses, the others None.

        Args:
            from_stage: with generated inputs, the first stage that acts itself, on its own generated input; by default 0: the
                serial network.

        Raises:
            StopIteration, BatchError, PeerError: as :meth:`train_batch`, on every rank in the same call.
        """
        refuse_ambient(self.device, "eval_batch")
        count = self.micro_batches if num_micro_batches is None else num_micro_batches
        if count < 1:
            raise ValueError(f"eval_batch(num_micro_batches={num_micro_batches}): at least 1 is needed")
        stages = self.placement.stages if self.axes.input == "auxnet" else 1
        if not 0 <= from_stage < stages:
            raise ValueError(f"eval_batch(from_stage={from_stage}): "
                             + (f"from 0 to {stages - 1}" if stages > 1 else "no input is generated"))
        with self._failure_told():
            self._check_hooks()
            self.runner.pause()
            self.module.eval()
            for part in self._before_evaluation:
                part.before_evaluation()
            source = partial(self.feed.next, data_iter, self.batch_fn, "eval_batch")
            results, error = evaluate(self.passes, count, source, ask_heads=self.decoupled.ensemble, compute_loss=compute_loss,
                                      from_stage=from_stage)
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
        self.runner.pause()
        return save_checkpoint(self, self._parts, save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)

    def load_checkpoint(self, load_dir: str, tag: Any = None, load_module_strict: bool = True,
                        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True,
                        load_module_only: bool = False, custom_load_fn: Any = None) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint, on the same or another number of pipe ranks; training goes on as if it had never stopped.

        Returns:
            The checkpoint's path and the client's state; ``(None, None)`` where there is none.
        """
        self.runner.settle()
        return load_checkpoint(self, self._parts, load_dir, tag, load_module_strict, load_optimizer_states,
                               load_lr_scheduler_states, load_module_only)

    def stage_metrics(self) -> list[dict[str, float]]:
        """Each stage's mean loss and accuracy since the last call, by its own head, over all replicas; all ranks must call it.
        With a global gradient only the last stage has a loss, and the list is empty."""
        parts = gather({s: stage.take_metrics() for s, stage in self.stages.items()})
        return [metrics for s in range(self.placement.stages)
                if (metrics := mean_by_name([part[s] for part in parts if s in part])) is not None]

    def decoupled_summary(self) -> dict[str, Any]:
        """What the run did, over all ranks (all must call it): delays, records, bytes and messages sent, tracked gradients."""
        lessons = {} if self.decoupled.head_teaching is None else {"head_teaching": self._lessons()}
        return summarize(self.decoupled.method, self.plan, self.axes.hops, self.axes.flush, self.workers, self.network,
                         self.watchers, sum(refresh.bytes_sent for refresh in self._refreshes),
                         {**self.runner.report(), **lessons})

    def _lessons(self) -> dict[str, Any]:
        """How far heads were taught, and each one's loss by update. A collective call."""
        settings = self.decoupled.head_teaching
        assert settings is not None
        parts = gather({s: (self.stage_optimizers[s].updates, lesson.losses) for s, stage in self.stages.items()
                        if (lesson := stage.lesson) is not None and lesson.has_head})
        by_stage = {s: told for part in parts for s, told in part.items()}
        return {"updates": min([settings.updates, *(updates for updates, _ in by_stage.values())]), "of": settings.updates,
                "losses": {s: losses for s, (_, losses) in sorted(by_stage.items())}}
