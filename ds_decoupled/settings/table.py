"""Every setting that DeepSpeed 0.19.8 reads at the top of its JSON, and what may stand there.

Names and defaults: ``deepspeed/runtime/constants.py`` and the modules that ``deepspeed/runtime/config.py`` calls. Blocks for
which DeepSpeed has pydantic models are checked by these (:mod:`ds_decoupled.settings.models`), ``optimizer`` and ``scheduler``
by what they build (:mod:`ds_decoupled.settings.built`); here they are objects and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds_decoupled.errors import ConfigError
from ds_decoupled.settings.kinds import (
    Check,
    anything,
    block,
    check_keys,
    flag,
    listing,
    number,
    one_of,
    optional,
    text,
    whole,
)

BLOCK = "decoupled"

#: The three of which a batch is made, see :func:`batch_sizes`.
BATCH, MICRO_BATCH, K = SIZES = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"

#: train_batch() takes all k micro-batches of a call from the data before it starts.
MOST_K = 100_000
MOST_MICRO_BATCH = 10_000_000

_k = whole(1, MOST_K, "one call of train_batch() takes so many micro-batches from the data before it starts",
           "Take a smaller one: an update follows every so many micro-batches.")
_dtype = one_of("fp32", "fp16", "bf16", any_case=True)
_example = '{"type": "AdamW", "params": {"lr": 1e-3}}'

SETTINGS: dict[str, Check] = {
    "train_batch_size": optional(whole(1, MOST_K * MOST_MICRO_BATCH)),
    "train_micro_batch_size_per_gpu": optional(whole(1, MOST_MICRO_BATCH, "samples of one forward pass")),
    "gradient_accumulation_steps": optional(_k),
    "managed_gradient_accumulation": flag,
    "steps_per_print": optional(whole(1, why="updates from line to line",
                                      hint="Leave it out, or give null, to print nothing.")),
    "dump_state": flag,
    "disable_python_gc": flag,
    "disable_allgather": flag,
    "communication_data_type": optional(_dtype),
    "seq_parallel_communication_data_type": optional(_dtype),
    "prescale_gradients": flag,
    "gradient_predivide_factor": number(0, above=True),
    "gradient_allreduce_op": one_of("mean", "sum", any_case=True),
    "gradient_clipping": number(0, why="the largest norm of a stage's gradient, 0 for no clipping"),
    "zero_optimization": block(example='{"stage": 1}'),
    "zero_allow_untested_optimizer": flag,
    "zero_force_ds_cpu_optimizer": flag,
    "optimizer": block({"type": anything, "params": anything, "legacy_fusion": flag}, _example),
    "scheduler": block({"type": anything, "params": anything},
                       '{"type": "WarmupLR", "params": {"warmup_num_steps": 100}}'),
    "fp16": block(),
    "bf16": block(),
    "bfloat16": block(),
    "torch_autocast": block({"enabled": flag, "dtype": text, "lower_precision_safe_modules": listing(text, "names of modules")},
                            '{"enabled": true, "dtype": "bfloat16"}'),
    "data_types": block({"grad_accum_dtype": optional(_dtype), "param_dtype": optional(_dtype),
                         "buffer_dtype": optional(_dtype),
                         "keep_in_fp32_modules": anything}, '{"grad_accum_dtype": "fp32"}'),
    "activation_checkpointing": block({
        "partition_activations": flag, "number_checkpoints": optional(whole(1)), "contiguous_memory_optimization": flag,
        "synchronize_checkpoint_boundary": flag, "profile": flag, "cpu_checkpointing": flag},
        '{"partition_activations": true}'),
    "pipeline": block({
        "stages": anything, "partition": anything, "seed_layers": flag, "activation_checkpoint_interval": whole(0),
        "pipe_partitioned": flag, "grad_partitioned": flag, "use_reentrant": flag}, '{"use_reentrant": false}'),
    "tensorboard": block(),
    "wandb": block(),
    "csv_monitor": block(),
    "comet": block(),
    "comms_logger": block(),
    "flops_profiler": block({
        "enabled": flag, "recompute_fwd_factor": number(0), "profile_step": whole(1), "module_depth": whole(-1),
        "top_modules": whole(1), "detailed": flag, "output_file": optional(text)}),
    "wall_clock_breakdown": flag,
    "memory_breakdown": flag,
    "timers": block(example='{"throughput": {"enabled": true}}'),
    "autotuning": block(),
    "hybrid_engine": block(),
    "data_efficiency": block(),
    "checkpoint": block({
        "tag_validation": one_of("ignore", "warn", "fail", any_case=True), "load_universal": flag,
        "use_node_local_storage": flag,
        "parallel_write": block({"pipeline_stage": flag}, '{"pipeline_stage": true}'), "checkpoint_serialization": flag,
        "writer": block()}, '{"tag_validation": "Warn"}'),
    "aio": block(example='{"block_size": 1048576}'),
    "dataloader_drop_last": flag,
    "log_level": optional(one_of("debug", "info", "warning", "error", "critical", any_case=True)),
    "datastates_ckpt": anything,
    "weight_quantization": block(),
    "compile": block(example='{"deepcompile": true}'),
    "tensor_parallel": block(example='{"autotp_size": 2}'),
    "expert_parallel": block(),
    "use_data_before_expert_parallelism": flag,
    "vocabulary_size": optional(whole(1)),
    "sequence_parallel_size": whole(1),
    "data_parallel_size": whole(1),
    BLOCK: anything,
}

#: Refused by DeepSpeed 0.19.8 itself, wherever they stand; it says more in ``_reject_removed_config_keys`` (runtime/config.py).
REMOVED = ("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue", "sparse_attention",
           "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop")


def check_table(config: Mapping[str, Any]) -> None:
    """The names at the top and the types of what stands there. Names that begin with ``_`` are the user's own.

    Raises:
        ConfigError: for the first that does not fit.
    """
    given = {key: value for key, value in config.items() if not (isinstance(key, str) and key.startswith("_"))}
    for key in REMOVED:
        if key in given:
            raise ConfigError(key, given[key], "DeepSpeed has removed it and refuses configurations that have it",
                              "Leave it out.")
    _check_names(given)
    for key, value in given.items():
        SETTINGS[key](key, value)


def _check_names(given: Mapping[str, Any]) -> None:
    try:
        check_keys("", given, SETTINGS)
    except ConfigError as error:
        setting, value, _, hint = error.fields
        raise ConfigError(setting, value, "DeepSpeed has no such setting and would ignore it",
                          hint if hint.startswith("Did") else 'Leave it out, or let its name begin with "_".') from None


def batch_sizes(config: Mapping[str, Any], replicas: int) -> tuple[int, int]:
    """``(micro-batch, k)`` by DeepSpeed's rule: ``train_batch_size = micro-batch * k * replicas``; one of the three may be left
    out, and one is enough if it is a batch size.

    >>> batch_sizes({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}, replicas=2)
    (8, 4)

    Raises:
        ConfigError: if they do not go into one another.
    """
    for name in SIZES:
        SETTINGS[name](name, config.get(name))
    total, micro, k = (config.get(name) for name in SIZES)
    if micro is None and total is None:
        raise ConfigError(MICRO_BATCH, None, f'a micro-batch size is needed, here or by "{BATCH}"',
                          "Set it in the DeepSpeed JSON.")
    if micro is None:
        k = k or 1
        micro = (total or 0) // (k * replicas)
    elif k is None:
        k = 1 if total is None else total // (micro * replicas)
    if total is not None and (micro * k * replicas != total or not micro or not k):
        given = {name: config[name] for name in (MICRO_BATCH, K) if config.get(name) is not None}
        factor = next((f'a multiple of "{name}", which is {value}: ' for name, value in given.items() if len(given) == 1), "")
        product = " x ".join(str(given.get(name, "?")) for name in (MICRO_BATCH, K))
        raise ConfigError(BATCH, total, f"{factor}it is micro-batch x k x replicas: {MICRO_BATCH} x {K} x replicas = "
                          f"{product} x {replicas} must make it up", "Leave one of the three out, or mend it.")
    if total is not None:
        _k(K, k)
    return micro, k
