"""Settings of DeepSpeed that its own engine uses and a decoupled one would not: refused by name, with the reason.

``docs/deepspeed_settings.md`` is the same as a table. With ``"method": "backprop"`` the engine is DeepSpeed's own, and all of
them work as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_decoupled.errors import ConfigError

OR_BACKPROP = 'Leave it out, or take "method": "backprop", which is DeepSpeed\'s own engine.'


@dataclass(frozen=True)
class Unsupported:
    """One setting.

    Attributes:
        path: its name, with dots.
        harmless: values that ask for nothing.
        why: a decoupled engine does not use it.
        instead: what to do.
    """

    path: str
    harmless: tuple[Any, ...]
    why: str
    instead: str = OR_BACKPROP


OFF = (False, None)
ZERO = "zero_optimization"
#: What DeepSpeed's ZeRO-1 reads (``_configure_zero_optimizer`` in runtime/engine.py); all else of the block belongs to stages 2
#: and 3 or to offloading.
ZERO_1 = frozenset({"stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
                    "allgather_partitions", "allgather_bucket_size", "compute_grad_norm", "load_from_fp32_weights",
                    "round_robin_gradients", "parameter_alignment"})

UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported("pipeline.activation_checkpoint_interval", (0,), "what a stage keeps for its backward pass is the method's "
                'business', 'Take "recover": "input" (as "method": "dsp" does): inputs are kept, and the forward pass runs '
                'again.'),
    Unsupported("fp16.enabled", OFF, "the loss scale of a delayed gradient is not the one in force when it arrives, and "
                "stages that step on their own agree on no common one", 'Take "bf16" or float32.'),
    Unsupported("pipeline.stages", ("auto",), "DeepSpeed does not read it", 'Set "stages" in the "decoupled" block.'),
    Unsupported("pipeline.partition", ("best",), "DeepSpeed does not read it", 'Set "partition" in the "decoupled" block.'),
    Unsupported("pipeline.seed_layers", OFF, "DeepSpeed does not read it", "Give the module seed_layers=True."),
    Unsupported("pipeline.pipe_partitioned", (True,), "activations are not cut among tensor-parallel ranks"),
    Unsupported("pipeline.grad_partitioned", (True,), "gradients are not cut among tensor-parallel ranks"),
    Unsupported("pipeline.use_reentrant", (True,), "no activations are checkpointed"),
    *(Unsupported(f"activation_checkpointing.{name}", OFF, "the engine checkpoints no activations",
                  'Take "recover": "input", and leave it out.')
      for name in ("partition_activations", "number_checkpoints", "contiguous_memory_optimization",
                   "synchronize_checkpoint_boundary")),
    Unsupported("activation_checkpointing.profile", OFF, "the engine checkpoints no activations",
                'Take "wall_clock_breakdown": true.'),
    Unsupported("activation_checkpointing.cpu_checkpointing", OFF, "the engine checkpoints no activations",
                'Take "recover": "reconstruct", which keeps nothing, or leave it out.'),
    Unsupported("flops_profiler.enabled", OFF, "it counts inside the whole model's forward(), which stages do not call",
                'Take "wall_clock_breakdown": true for the time of each kind of action, or "method": "backprop".'),
    Unsupported("memory_breakdown", OFF, "it reports around the whole model's forward, backward and step, which stages do not "
                "call",
                "Leave it out and read decoupled_summary()."),
    Unsupported("timers", ({},), "samples a second are counted by the engine itself, without synchronizing the device",
                "Leave it out."),
    Unsupported("compile", ({},), "it is for engine.compile(), which compiles a whole model's forward()",
                'Set "compile" in the "decoupled" block.'),
    Unsupported("comms_logger.enabled", OFF, "stages talk by links of their own, which it does not see",
                "Leave it out: decoupled_summary() counts messages and bytes."),
    Unsupported("autotuning.enabled", OFF, "it times the whole model's forward()", 'Leave it out; "ds-decoupled plan" shows '
                "what a plan costs."),
    Unsupported("hybrid_engine.enabled", OFF, "DeepSpeed makes no hybrid engine of a pipeline", "Leave it out."),
    Unsupported("data_efficiency.enabled", OFF, "a pipeline's data loader takes a sampler of its own in its place"),
    Unsupported("tensor_parallel.autotp_size", (0, 1, None), "stages are not cut across ranks", "Leave it out."),
    Unsupported("expert_parallel.enabled", OFF, "stages are not cut across ranks", "Leave it out."),
    Unsupported("sequence_parallel_size", (1, None), "a pipeline's ranks are its own and its replicas'", "Leave it out."),
    Unsupported("data_parallel_size", (None,), "replicas are the processes over the pipe ranks", "Leave it out, and give "
                "num_stages to the module."),
    Unsupported("seq_parallel_communication_data_type", (None,), "sequences are not cut across ranks", "Leave it out."),
    Unsupported("disable_allgather", OFF, "DeepSpeed does not read it", "Leave it out."),
    Unsupported("disable_python_gc", OFF, "DeepSpeed would have to collect in its own step(), which stages do not call"),
    Unsupported("zero_force_ds_cpu_optimizer", (True, None), "it belongs to offloading", "Leave it out."),
    Unsupported("optimizer.legacy_fusion", OFF, "it belongs to fp16", "Leave it out."),
    Unsupported("managed_gradient_accumulation", (True, None), "DeepSpeed has no such pipeline", "Leave it out."),
    Unsupported("bf16.immediate_grad_update", OFF, "gradients are added when a micro-batch's backward pass is complete",
                "Leave it out."),
    Unsupported("bf16.bf16_master_weights_and_grads", OFF, "stages add up their gradients in float32", "Leave it out."),
    Unsupported("bf16.bf16_optimizer_states", OFF, "stages step in float32", "Leave it out."),
    Unsupported("checkpoint.load_universal", OFF, "a decoupled checkpoint loads on any number of pipe ranks as it is",
                "Leave it out."),
    Unsupported("checkpoint.use_node_local_storage", OFF, "every stage's file goes into one folder",
                "Save where all ranks write."),
    Unsupported("checkpoint.tag_validation", ("warn", "Warn", "WARN", "fail", "Fail", "FAIL", None),
                "a tag that differs between ranks is always an error", 'Leave it out, or give "Fail".'),
    Unsupported("checkpoint.writer", (None,), "stages write their files themselves"),
    Unsupported("checkpoint.checkpoint_serialization", (True, None), "stages write their files themselves"),
    Unsupported("datastates_ckpt", OFF, "stages write their files themselves"),
    Unsupported("aio", ({},), "it belongs to offloading to NVMe", "Leave it out."),
    Unsupported("weight_quantization", ({},), "it belongs to inference", "Leave it out."),
    Unsupported(f"{ZERO}.overlap_comm", OFF, "DeepSpeed turns it off in pipelines", "Leave it out."),
)


def check_supported(config: Mapping[str, Any]) -> None:
    """Nothing in a checked ``config`` that a decoupled engine would ignore. Raises :class:`ConfigError` if there is."""
    for entry in UNSUPPORTED:
        found, value = lookup(config, entry.path)
        if found and not any(type(value) is type(h) and value == h for h in entry.harmless):
            raise ConfigError(entry.path, value, f"a decoupled engine does not use it: {entry.why}", entry.instead)
    _check_zero(config)


def check_checkpoint_interval(interval: int) -> None:
    """A module's ``activation_checkpoint_interval``. Raises :class:`ConfigError` if it asks for anything."""
    if interval:
        raise ConfigError("activation_checkpoint_interval", interval, "what a stage keeps for its backward pass is the "
                          "method's business, and a decoupled engine checkpoints nothing beside it",
                          'Leave it out of the module, and take "recover": "input" (as "method": "dsp" does).')


def lookup(config: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """Whether ``path`` stands in ``config``, and its value there."""
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _check_zero(config: Mapping[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = config.get(ZERO) or {}
    if given.get("stage", 0) != 1:
        return
    default, asked = DeepSpeedZeroConfig(stage=1), DeepSpeedZeroConfig(**given)
    names = {field.alias: name for name, field in DeepSpeedZeroConfig.model_fields.items() if field.alias}
    for key, value in given.items():
        name = names.get(key, key)
        if name not in ZERO_1 and getattr(asked, name, None) != getattr(default, name, None):
            raise ConfigError(f"{ZERO}.{key}", value, "a decoupled engine does not use it: of ZeRO it has stage 1, on the "
                              "device, and this belongs to higher stages or to offloading", "Leave it out.")
