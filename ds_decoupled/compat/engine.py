"""DeepSpeed's engine with public hooks in the place of its private ones, made on all ranks or on none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import PipeSchedule
from torch import Tensor

from ds_decoupled.collectives import together
from ds_decoupled.errors import naming


@contextmanager
def engine_class(factory: Any) -> Iterator[None]:
    """Within, ``deepspeed.initialize`` makes pipeline engines by ``factory``: it looks the class up by this name and has
    no other hook."""
    original = deepspeed.PipelineEngine
    deepspeed.PipelineEngine = factory
    try:
        yield
    finally:
        deepspeed.PipelineEngine = original


class GuardedPipelineEngine(PipelineEngine):
    """A ``PipelineEngine`` that is made on all ranks or on none: what one cannot do while it is made, all raise.

    Between two of these steps DeepSpeed makes collective calls, where the others would wait for a rank that has left.
    """

    def _do_sanity_check(self) -> None:
        """DeepSpeed looks at what was set, on this device."""
        together(lambda: naming("deepspeed_config", "the settings", super(GuardedPipelineEngine, self)._do_sanity_check))

    def _configure_distributed_model(self, model: Any) -> None:
        together(lambda: super(GuardedPipelineEngine, self)._configure_distributed_model(model))

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        together(lambda: self.make_optimizer(client_optimizer, model_parameters))

    def _configure_lr_scheduler(self) -> None:
        together(self.make_lr_scheduler)

    def make_optimizer(self, client_optimizer: Any, parameters: list[Any]) -> None:
        """DeepSpeed's own; ``ConfigError`` in place of what it raises."""
        naming("optimizer", self._asked_for("optimizer", client_optimizer),
               lambda: super(GuardedPipelineEngine, self)._configure_optimizer(client_optimizer, parameters))

    def make_lr_scheduler(self) -> None:
        """DeepSpeed's own; ``ConfigError`` in place of what it raises."""
        naming("scheduler", self._asked_for("scheduler", self.client_lr_scheduler),
               super()._configure_lr_scheduler)

    def _asked_for(self, block: str, client: Any) -> Any:
        if client is not None:
            return getattr(client, "__qualname__", type(client).__qualname__)
        names = {"optimizer": (self.optimizer_name, self.optimizer_params),
                 "scheduler": (self.scheduler_name, self.scheduler_params)}
        name, params = names[block]
        return {"type": name(), "params": params()}


class PipelineEngineBase(GuardedPipelineEngine):
    """A ``PipelineEngine`` with public hooks in place of the private ones."""

    #: Instruction types to functions of ``(engine, **kwargs)``.
    instruction_map: Mapping[type, Any] = {}
    client_lr_scheduler: Any

    # -- hooks that a subclass fills ---------------------------------------------------------------------------------

    def configure_optimizers(self, client_optimizer: Any, model_parameters: Any) -> None:
        """Called once, when the module is on its device in its final type."""
        raise NotImplementedError

    def configure_lr_schedulers(self) -> None:
        """Called right after :meth:`configure_optimizers`."""
        raise NotImplementedError

    # -- DeepSpeed's own machinery, for the subclass to call -----------------------------------------------------------

    def build_optimizer(self, client_optimizer: Any, parameters: list[Any]) -> tuple[Any, Any]:
        """DeepSpeed's wrapped optimizer and the basic one inside, for ``parameters`` (or groups of them)."""
        self.make_optimizer(client_optimizer, parameters)
        return self.optimizer, self.basic_optimizer

    def build_lr_scheduler(self, optimizer: Any, block: Mapping[str, Any] | None = None) -> Any:
        """The LR scheduler of one optimizer: of ``block`` (as the JSON's ``scheduler``), else the client's callable's or the
        JSON's; None where there is none."""
        if block is None and callable(self.client_lr_scheduler):
            client = self.client_lr_scheduler
            return naming("scheduler", self._asked_for("scheduler", client), lambda: client(optimizer))
        config: Any = self._config
        usual = config.scheduler_name, config.scheduler_params
        try:
            if block is not None:
                config.scheduler_name, config.scheduler_params = block["type"], block.get("params", {})
            return naming("scheduler", self._asked_for("scheduler", None), lambda: self._scheduler_from_config(optimizer))
        finally:
            config.scheduler_name, config.scheduler_params = usual

    def run_schedule(self, schedule: PipeSchedule) -> None:
        """Execute every instruction of ``schedule``."""
        self._exec_schedule(schedule)

    def allreduce_gradients_of(self, grads: list[Tensor]) -> None:
        """Average ``grads`` over the data-parallel replicas, in place."""
        if self.is_data_parallel and grads:
            self._reduce_non_expert_gradients(grads, 500_000_000)

    def reduce_outputs(self, outputs: list[Any], reduce: str | None, micro_batches: int) -> Any:
        """DeepSpeed's reduction of what evaluation gave."""
        if reduce is not None and outputs and not isinstance(outputs[0], Tensor):
            raise ValueError(f"eval_batch(reduce_output={reduce!r}) averages losses that are single tensors; for tuples take "
                             "reduce_output=None and reduce the list that comes back")
        return self._reduce_outputs(outputs, reduce=reduce, micro_batches=micro_batches)

    def broadcast_from_last(self, value: Any) -> Tensor:
        """``value`` of the last pipe rank, on every rank; without dimensions, as there."""
        return self._bcast_pipe_scalar(value).reshape(())

    # -- the private names -----------------------------------------------------------------------------------------------

    @property
    def _INSTRUCTION_MAP(self) -> Mapping[type, Any]:  # noqa: N802  (DeepSpeed's name)
        return self.instruction_map

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        self.configure_optimizers(client_optimizer, model_parameters)

    def _configure_lr_scheduler(self) -> None:
        self.configure_lr_schedulers()

    def _backward_post_hook(self) -> None:
        """DeepSpeed's epilogue of a whole-model backward; stages count their own."""


def around_instructions(engine: PipelineEngine, around: Callable[[type, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace each function that DeepSpeed's own engine has for an instruction by what ``around`` makes of the two."""
    engine._INSTRUCTION_MAP = {kind: around(kind, function) for kind, function in engine._INSTRUCTION_MAP.items()}
