"""Every private name of DeepSpeed 0.19 that this package touches.

The rest of the package sees the public methods of the two base classes and the functions below; a test checks that each
private name is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, MUON_OPTIMIZER
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import PipeSchedule
from deepspeed.runtime.utils import set_random_seed
from torch import Tensor
from torch.compiler import set_stance

from ds_decoupled.collectives import gather, together
from ds_decoupled.errors import ConfigError, RankError

T = TypeVar("T")

#: Private names by owner, for the test that they are still there.
PRIVATE_NAMES: dict[Any, tuple[str, ...]] = {
    PipelineModule: ("_partition_layers", "_set_bounds", "_count_layer_params", "_build"),
    PipelineEngine: ("_do_sanity_check", "_configure_distributed_model", "_configure_optimizer", "_configure_lr_scheduler",
                     "_train_schedule", "_exec_schedule",
                     "_reduce_outputs", "_bcast_pipe_scalar", "_INSTRUCTION_MAP", "_backward_post_hook",
                     "_reduce_non_expert_gradients", "_scheduler_from_config"),
}


def wait_for_all() -> None:
    """All ranks are here, and all process groups that they made so far stand.

    To be called before what may find a mistake: a rank that leaves resets the connections of those that still make theirs, and
    they would tell of nothing but that.
    """
    if dist.is_initialized():
        dist.barrier()


class PipelineModuleBase(PipelineModule):
    """A ``PipelineModule`` whose ranks begin at the layers that :meth:`rank_layer_bounds` says."""

    def rank_layer_bounds(self) -> list[int]:
        """P+1 layer indices; called once, when specs and topology are known and nothing is built."""
        raise NotImplementedError

    def _partition_layers(self, method: str = "uniform") -> None:
        wait_for_all()  # the grid has made its groups
        self.parts = together(self.rank_layer_bounds)
        rank = self.pipe_rank
        self._set_bounds(start=self.parts[rank], stop=self.parts[rank + 1])

    def _build(self) -> None:
        together(super()._build)  # a layer that cannot be built is one rank's alone

    @property
    def pipe_rank(self) -> int:
        """This process's place on the pipe axis."""
        return int(self._topo.get_coord(self.global_rank).pipe)


def layer_specs(module: PipelineModule) -> list[Any]:
    """What the whole model is made of, built or not."""
    return list(module._layer_specs)


def layer_parameters(module: PipelineModule) -> list[float]:
    """Trainable parameters of every layer of the whole model before it is built, counted without memory where the layers allow
    it; no random number is used up."""
    with torch.random.fork_rng():
        try:
            with torch.device("meta"):
                counts = module._count_layer_params()
        except (RuntimeError, NotImplementedError, ValueError):  # a layer that looks at its own values while it is built
            counts = module._count_layer_params()
    return [float(n) for n in counts]


def built_parameters(module: PipelineModule) -> list[float]:
    """Trainable parameters of every layer of the whole model once it is built, each counted on its rank; a collective call."""
    counts = [0.0] * len(module._layer_specs)
    for index, function in enumerate(module.forward_funcs, module._local_start):
        # A tied layer with a forward_fn is partial(forward_fn, layer).
        layer = function.args[0] if isinstance(function, partial) and function.args else function
        if isinstance(layer, torch.nn.Module):
            counts[index] = float(sum(p.numel() for p in layer.parameters() if p.requires_grad))
    return [max(layer) for layer in zip(*gather(counts))]


def layer_seeding(module: PipelineModule) -> Callable[[int, int], None] | None:
    """How ``module`` seeds a layer for a micro-batch where the user asked for it (``seed_layers``); None where nobody did.

    The number is that of ``PipelineModule.forward``, whose first micro-batch has the offset 2.
    """
    if not module.seed_layers:
        return None
    seed: Callable[[int], Any] = module.seed_fn or set_random_seed

    def seed_layer(layer: int, micro_batch: int) -> None:
        seed(module.base_seed * (micro_batch + 2) + layer)

    return seed_layer


def hooks_of(module: PipelineModule) -> list[int]:
    """The ids of the hooks on the module itself, not on its layers."""
    kinds = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return [key for hooks in kinds for key in hooks]


def check_runs_by_layers(module: PipelineModule) -> None:
    """Stages call a module's layers one by one: what else it does when it is called would not happen.

    Raises:
        ConfigError: for a ``forward`` of its own, or hooks on the module itself.
    """
    if getattr(module.forward, "__func__", None) is not PipelineModule.forward:
        raise ConfigError("model", type(module).__name__, "it has a forward() of its own, and stages call its layers one by "
                          "one", "Put what it does into a layer.")
    if hooks_of(module):
        raise ConfigError("model", type(module).__name__, "it has hooks, and stages call its layers one by one, never the "
                          "module", "Register them on a layer.")


def tied_keys(module: PipelineModule) -> list[str]:
    """Keys of tied layers that appear more than once."""
    keys = [spec.key for spec in module._layer_specs if isinstance(spec, deepspeed.pipe.TiedLayerSpec)]
    return sorted({key for key in keys if keys.count(key) > 1})


def knows_optimizer(name: str) -> bool:
    """Whether DeepSpeed takes ``name`` as an optimizer's type."""
    return name.lower() in DEEPSPEED_OPTIMIZERS or hasattr(torch.optim, name)


def has_expert_layers(module: PipelineModule) -> bool:
    """Whether a layer here is DeepSpeed's mixture of experts."""
    return any(isinstance(m, MoE) for m in module.modules())


def norms_within_stages(module: PipelineModule) -> None:
    """Make gradient norms and overflow flags a matter of the stage alone.

    DeepSpeed's optimizers reduce both over ``mpu.get_model_parallel_group()``, which spans all stages, so that stages that
    step at different times would wait for one another for ever. The slice group is what is left of it within a stage.
    """
    grid = module.mpu()
    grid.ds_model_proc_group = grid.get_slice_parallel_group()
    grid.ds_model_rank = grid.get_slice_parallel_rank()
    grid.ds_model_world_size = grid.get_slice_parallel_world_size()


def clip_over_all_stages(module: PipelineModule) -> None:
    """Mend float32 clipping of a flushed pipeline: without this mark DeepSpeed clips every stage by stage 0's norm."""
    for parameter in module.parameters():
        parameter.model_parallel = True


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
        together(lambda: _naming("deepspeed_config", "the settings", super(GuardedPipelineEngine, self)._do_sanity_check))

    def _configure_distributed_model(self, model: Any) -> None:
        together(lambda: super(GuardedPipelineEngine, self)._configure_distributed_model(model))

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        together(lambda: self.make_optimizer(client_optimizer, model_parameters))

    def _configure_lr_scheduler(self) -> None:
        together(self.make_lr_scheduler)

    def make_optimizer(self, client_optimizer: Any, parameters: list[Any]) -> None:
        """DeepSpeed's own; ``ConfigError`` in place of what it raises."""
        _naming("optimizer", self._asked_for("optimizer", client_optimizer),
                lambda: super(GuardedPipelineEngine, self)._configure_optimizer(client_optimizer, parameters))

    def make_lr_scheduler(self) -> None:
        """DeepSpeed's own; ``ConfigError`` in place of what it raises."""
        _naming("scheduler", self._asked_for("scheduler", self.client_lr_scheduler),
                super()._configure_lr_scheduler)

    def _asked_for(self, block: str, client: Any) -> Any:
        if client is not None:
            return getattr(client, "__qualname__", type(client).__qualname__)
        names = {"optimizer": (self.optimizer_name, self.optimizer_params),
                 "scheduler": (self.scheduler_name, self.scheduler_params)}
        name, params = names[block]
        return {"type": name(), "params": params()}


def _naming(setting: str, value: Any, action: Callable[[], T]) -> T:
    """``action``, whose raw errors get the name and the value of the setting that they come from."""
    try:
        return action()
    except (ConfigError, RankError):
        raise
    except Exception as error:
        raise ConfigError(setting, value, f"DeepSpeed cannot work with it here ({type(error).__name__}: {error})",
                          "See https://www.deepspeed.ai/docs/config-json/.") from error


def as_deepspeeds_own(engine: GuardedPipelineEngine) -> PipelineEngine:
    """The engine, once it is made: DeepSpeed's own class, and nothing of ours."""
    engine.__class__ = PipelineEngine
    return engine


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
            return _naming("scheduler", self._asked_for("scheduler", client), lambda: client(optimizer))
        config: Any = self._config
        usual = config.scheduler_name, config.scheduler_params
        try:
            if block is not None:
                config.scheduler_name, config.scheduler_params = block["type"], block.get("params", {})
            return _naming("scheduler", self._asked_for("scheduler", None), lambda: self._scheduler_from_config(optimizer))
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


def reduce_and_step(engine: PipelineEngineBase, optimizer: Any, parameters: list[Any],
                    clip: Callable[[list[Any], float], Any] | None = None) -> float | None:
    """Average the dense gradients over replicas, clip by this optimizer's own norm, step, and clear.

    Args:
        engine: whose settings apply.
        optimizer: DeepSpeed's wrapped optimizer.
        parameters: its parameters.
        clip: in the place of ``torch.nn.utils.clip_grad_norm_``.

    Returns:
        The gradient norm before clipping, where it was computed.
    """
    # On CPU, compiling DeepSpeed's Muon takes 32 s of every process and then saves a fifth of its 7 ms a block of width 128.
    eager = engine.device.type == "cpu" and engine.optimizer_name() == MUON_OPTIMIZER
    with set_stance("force_eager") if eager else nullcontext():
        return _reduce_and_step(engine, optimizer, parameters, clip)


def _reduce_and_step(engine: PipelineEngineBase, optimizer: Any, parameters: list[Any],
                     clip: Callable[[list[Any], float], Any] | None) -> float | None:
    norm: float | None = None
    if isinstance(optimizer, BF16_Optimizer):
        engine.allreduce_gradients_of(optimizer.get_grads_for_reduction()[0])
        optimizer.step()
        norm = optimizer._global_grad_norm
    elif hasattr(optimizer, "reduce_gradients"):  # ZeRO-1
        optimizer.set_gradient_accumulation_boundary(True)
        optimizer.reduce_gradients(pipeline_parallel=True)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.set_gradient_accumulation_boundary(False)
        norm = optimizer._global_grad_norm
    else:
        engine.allreduce_gradients_of([p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse])
        most = engine.gradient_clipping()
        if most > 0:
            norm = float((clip or torch.nn.utils.clip_grad_norm_)(parameters, most))
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
    return norm


def accumulate(optimizer: Any) -> None:
    """After a micro-batch's backward: where the optimizer accumulates in float32 (bf16), add and clear."""
    if isinstance(optimizer, BF16_Optimizer):
        optimizer.update_hp_grads(clear_lp_grads=False)
        optimizer.clear_lp_grads()


def accumulated(optimizer: Any, parameters: list[Any]) -> list[Tensor | None]:
    """The gradients accumulated so far, one per parameter; for a checkpoint in the middle of an accumulation."""
    if isinstance(optimizer, BF16_Optimizer):
        return [flat for group in optimizer.fp32_groups_gradients_flat for flat in (group,)]
    return [p.grad for p in parameters]


def restore_accumulated(optimizer: Any, parameters: list[Any], grads: list[Tensor | None]) -> None:
    """The inverse of :func:`accumulated`; whatever was accumulated before is gone."""
    if isinstance(optimizer, BF16_Optimizer):
        optimizer.clear_lp_grads(set_to_none=True)
        for index, (flat, saved) in enumerate(zip(optimizer.fp32_groups_gradients_flat, grads)):
            assert saved is not None
            flat.copy_(saved)
            # Norm and clipping heed only what is marked; what is zero adds nothing to either.
            optimizer.fp32_groups_has_gradients[index] = [bool(g.any()) for g in optimizer.fp32_groups_gradients[index]]
        return
    for parameter, grad in zip(parameters, grads):
        parameter.grad = None if grad is None else grad.to(parameter.device)


def drop_accumulated(optimizer: Any, parameters: list[Any]) -> None:
    """Forget what has been accumulated."""
    if isinstance(optimizer, BF16_Optimizer):
        optimizer.zero_grad()
    for parameter in parameters:
        parameter.grad = None


def refresh_masters(optimizer: Any) -> None:
    """The weights were replaced: where the optimizer keeps float32 copies of them, take those from the weights, or the next
    step would bring the old ones back."""
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()


def load_optimizer(optimizer: Any, state: Any, load_states: bool = True) -> None:
    """Load what ``optimizer.state_dict()`` gave on this rank: float32 copies of the weights always, moments and rates if
    ``load_states``."""
    if isinstance(optimizer, BF16_Optimizer) or hasattr(optimizer, "reduce_gradients"):
        rank = dist.get_rank(group=optimizer.dp_process_group)
        # Both index a list of all replicas' states by their own rank and need nothing of the others.
        states = [state if r == rank else None for r in range(dist.get_world_size(group=optimizer.dp_process_group))]
        # Without the last argument the copies keep the values that they have (bf16) or lose the bits that the weights lack.
        optimizer.load_state_dict(states, load_optimizer_states=load_states, load_from_fp32_weights=True)
    elif load_states:
        optimizer.load_state_dict(state)
