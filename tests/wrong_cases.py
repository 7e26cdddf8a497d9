"""Wrong settings and inputs, one a row, for ``wrong_settings.py``; ranks build a small pipeline with each.

A row names the setting that the message must name, what is changed in a configuration that works, and, where the message must
show something else than what was set, that.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "decoupled": {"method": "petra", "stages": "blocks", "timeout": 60},
}
LEFT_OUT = object()


@dataclass(frozen=True, eq=False)
class Wrong:
    """One row.

    Attributes:
        setting: that the message must name.
        change: settings by names with dots; ``LEFT_OUT`` removes one.
        shows: what the message must show of the value; by default the ``repr`` of what ``change`` gives the setting.
        of_rank_1: changes on rank 1 alone, beside ``change``.
        text: of a file (or, with ``base64``, a text) in place of the configuration.
        call: what the script does otherwise: names of ``wrong_settings.CALLS``.
        parses: no ranks are needed to find it.
    """

    setting: str
    change: dict[str, Any] = field(default_factory=dict)
    shows: str | None = None
    of_rank_1: dict[str, Any] = field(default_factory=dict)
    text: bytes | None = None
    as_base64: bool = False
    call: str = ""

    @property
    def name(self) -> str:
        """For the table."""
        if self.text is not None:
            return f"{'base64 of' if self.as_base64 else 'file'} {self.text[:40]!r}"
        told = ", ".join(f"{k}: {'left out' if v is LEFT_OUT else short(v)}" for k, v in self.change.items())
        other = ", ".join(f"{k}: {'left out' if v is LEFT_OUT else short(v)}" for k, v in self.of_rank_1.items())
        return "; ".join(filter(None, [self.call, told, f"rank 1 alone {other}" if other else ""]))

    @property
    def value(self) -> str:
        """What the message must show."""
        if self.shows is not None:
            return self.shows
        if self.text is not None:
            return base64.urlsafe_b64encode(self.text).decode() if self.as_base64 else "ds.json"
        given = self.change.get(self.setting, LEFT_OUT)
        if given is LEFT_OUT:
            for path, value in self.change.items():
                if isinstance(value, dict) and self.setting.startswith(f"{path}."):
                    inner = value
                    for part in self.setting.removeprefix(f"{path}.").split("."):
                        inner = inner[part] if isinstance(inner, dict) and part in inner else None
                    return repr(inner)
            return "None"
        return repr(given)


def short(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) < 60 else text[:57] + "..."


def changed(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``config`` with the changes."""
    new = json.loads(json.dumps(config))
    for path, value in change.items():
        *folders, last = path.split(".")
        here = new
        for part in folders:
            here = here.setdefault(part, {})
        if value is LEFT_OUT:
            here.pop(last, None)
        else:
            here[last] = value
    return new


def optimizer(kind: Any, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": params}}


def scheduler(kind: Any, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


NAN, INF = float("nan"), float("inf")

SIZES = [Wrong(name, {name: value}) for name in ("train_batch_size", "train_micro_batch_size_per_gpu",
                                                 "gradient_accumulation_steps")
         for value in ("8", 0, -2, 2.5, True, [4], "auto")]
SIZES += [
    Wrong("gradient_accumulation_steps", {"gradient_accumulation_steps": 10**9}),
    Wrong("train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": 10**12}),
    Wrong("train_batch_size", {"train_batch_size": 7}),
    Wrong("train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": LEFT_OUT}),
]

TOP = [
    *[Wrong("gradient_clipping", {"gradient_clipping": value}) for value in ("1.0", -1, True, [1.0], NAN)],
    *[Wrong("steps_per_print", {"steps_per_print": value}) for value in (0, -5, "10", 1.5, False)],
    *[Wrong("wall_clock_breakdown", {"wall_clock_breakdown": value}) for value in ("true", 1, {"enabled": True})],
    *[Wrong(name, {name: value}) for name, value in (
        ("prescale_gradients", "no"), ("gradient_predivide_factor", 0), ("gradient_predivide_factor", "2"),
        ("gradient_allreduce_op", "max"), ("communication_data_type", "float8"), ("dump_state", "yes"), ("log_level", "loud"),
        ("dataloader_drop_last", 3), ("zero_allow_untested_optimizer", "true"), ("vocabulary_size", "big"))],
    Wrong("train_micro_batch_size", {"train_micro_batch_size": 4}),
    Wrong("optimiser", {"optimiser": {"type": "SGD"}}),
    Wrong("zero_optimisation", {"zero_optimisation": {"stage": 1}}),
    Wrong("gradient_cliping", {"gradient_cliping": 1.0}),
    Wrong("decouple", {"decouple": {"method": "petra"}}),
    *[Wrong(name, {name: {"enabled": True}}) for name in ("amp", "elasticity", "curriculum_learning", "progressive_layer_drop",
                                                          "eigenvalue", "sparse_attention", "quantize_training")],
    Wrong("sparse_gradients", {"sparse_gradients": True}),
]

BLOCKS = [
    *[Wrong(name, {name: value}) for name in ("bf16", "fp16") for value in (True, "true", 1, ["enabled"])],
    *[Wrong(name, {name: value}) for name, value in (
        ("zero_optimization", True), ("zero_optimization", 1), ("tensorboard", "runs"), ("csv_monitor", True), ("wandb", 3),
        ("comet", "on"), ("flops_profiler", True), ("activation_checkpointing", True), ("comms_logger", "yes"),
        ("checkpoint", "Fail"), ("pipeline", 3), ("torch_autocast", True), ("data_types", "bf16"), ("compile", True),
        ("timers", True), ("data_efficiency", True), ("aio", 4), ("autotuning", True))],
    *[Wrong(path, {path: value}) for path, value in (
        ("bf16.enabled", "yes"), ("bf16.enabled", "false"), ("bf16.enable", True), ("fp16.loss_scale", "big"),
        ("fp16.initial_scale_power", "x"), ("zero_optimization.stage", 7), ("zero_optimization.stage", "one"),
        ("zero_optimization.stage", -1), ("zero_optimization.stage", "1"), ("zero_optimization.stages", 1),
        ("zero_optimization.reduce_bucket_size", 0), ("zero_optimization.reduce_bucket_size", "5e8"),
        ("zero_optimization.overlap_comm", "maybe"), ("tensorboard.enabled", "maybe"), ("csv_monitor.job", "x"),
        ("csv_monitor.output_path", 3), ("wandb.projekt", "p"), ("comms_logger.prof_ops", "all"),
        ("checkpoint.tag_validation", "Loud"), ("data_types.grad_accum_dtype", "fp8"), ("torch_autocast.dtype", 16),
        ("flops_profiler.profile_step", "2"), ("pipeline.activation_checkpoint_interval", "1"))],
]

OPTIMIZERS = [
    *[Wrong("optimizer", {"optimizer": value}) for value in ("SGD", True, ["SGD"], 3)],
    Wrong("optimizer.type", {"optimizer": {"params": {"lr": 0.1}}}),
    Wrong("optimizer.type", {"optimizer": {"type": 3}}),
    Wrong("optimizer.type", optimizer("SDG", lr=0.1)),
    Wrong("optimizer.type", optimizer("sgd", lr=0.1)),
    Wrong("optimizer.type", optimizer("Optimizer")),
    Wrong("optimizer.type", optimizer("LBFGS", lr=0.1)),
    Wrong("optimizer.type", optimizer("torch.optim.NoSuch", lr=0.1)),
    Wrong("optimizer.type", optimizer("no_such_package.SGD", lr=0.1)),
    Wrong("optimizer.parms", {"optimizer": {"type": "SGD", "parms": {"lr": 0.1}}}),
    Wrong("optimizer.params", {"optimizer": {"type": "SGD", "params": 0.1}}),
    Wrong("optimizer.params", {"optimizer": {"type": "SGD", "params": [0.1]}}),
    Wrong("optimizer.params.momentun", optimizer("SGD", lr=0.1, momentun=0.9)),
    *[Wrong("optimizer.params.lr", optimizer("SGD", lr=value)) for value in ("0.1", -0.1, "auto", [0.1], NAN)],
    Wrong("optimizer.params.nesterov", optimizer("SGD", lr=0.1, nesterov="true")),
    Wrong("optimizer.params.betas", optimizer("AdamW", lr=0.1, betas=[0.9], torch_adam=True)),
    Wrong("optimizer.params.betas", optimizer("AdamW", lr=0.1, betas=[0.9, 1.5], torch_adam=True)),
    Wrong("optimizer.params.betas", optimizer("AdamW", lr=0.1, betas="0.9, 0.99")),
    Wrong("optimizer.params.weight_decay", optimizer("Adam", lr=0.1, weight_decay="0.1")),
    Wrong("optimizer.params.wd", optimizer("AdamW", lr=0.1, wd=0.1)),
    Wrong("optimizer.params.eps", optimizer("AdamW", eps=-1, torch_adam=True)),
    Wrong("optimizer.params.max_grad_norm", optimizer("SGD", lr=0.1, max_grad_norm=1.0)),
    Wrong("optimizer.params.momentun", optimizer("Muon", lr=0.1, momentun=0.9)),
    Wrong("optimizer.params.ns_method", optimizer("Muon", lr=0.1, ns_method="fast", torch_adam=True)),
    Wrong("optimizer.params", optimizer("torch.optim.NAdam", lr="0.1"), "0.1"),
    Wrong("optimizer.params", optimizer("torch.optim.NAdam", momentun=0.1), "0.1"),
]

SCHEDULERS = [
    *[Wrong("scheduler", {"scheduler": value}) for value in ("WarmupLR", True, ["WarmupLR"])],
    Wrong("scheduler.type", {"scheduler": {"params": {}}}),
    Wrong("scheduler.type", scheduler("WarmUpLR")),
    Wrong("scheduler.type", scheduler(5)),
    Wrong("scheduler.params", {"scheduler": {"type": "WarmupLR"}}),
    Wrong("scheduler.params", {"scheduler": {"type": "WarmupLR", "params": [1]}}),
    Wrong("scheduler.params.warmup_steps", scheduler("WarmupLR", warmup_steps=10)),
    Wrong("scheduler.params.warmup_num_steps", scheduler("WarmupLR", warmup_num_steps="10")),
    Wrong("scheduler.params.warmup_num_steps", scheduler("WarmupLR", warmup_num_steps=0)),
    Wrong("scheduler.params.warmup_type", scheduler("WarmupLR", warmup_type="cosine")),
    Wrong("scheduler.params.total_num_steps", scheduler("WarmupDecayLR", warmup_num_steps=10)),
    Wrong("scheduler.params.total_num_steps", scheduler("WarmupCosineLR", total_num_steps="100", warmup_num_steps=1)),
    Wrong("scheduler.params.cycle_max_lr", scheduler("OneCycle", cycle_min_lr=0.1)),
    Wrong("scheduler.params.step_size", scheduler("StepLR")),
    Wrong("scheduler.params.gama", scheduler("StepLR", step_size=2, gama=0.1)),
    Wrong("scheduler.params.step_size", scheduler("StepLR", step_size=0)),
    Wrong("scheduler.params", scheduler("ReduceLROnPlateau"), "{}"),
    Wrong("decoupled.stage_schedulers", {"decoupled.stage_schedulers": ["WarmupLR", None]}),
    Wrong("decoupled.stage_schedulers", {"decoupled.stage_schedulers": [{"type": "WarmpLR"}, *[None] * 6]}, "'WarmpLR'"),
]

IGNORED = [Wrong(path, {path: value}) for path, value in (
    ("zero_optimization.stage", 2), ("zero_optimization.stage", 3), ("fp16.enabled", True),
    ("pipeline.activation_checkpoint_interval", 1), ("pipeline.stages", 4),
    ("activation_checkpointing.cpu_checkpointing", True),
    ("activation_checkpointing.partition_activations", True), ("flops_profiler.enabled", True), ("memory_breakdown", True),
    ("compile.deepcompile", True), ("timers.throughput.enabled", False), ("comms_logger.enabled", True),
    ("autotuning.enabled", True), ("hybrid_engine.enabled", True), ("data_efficiency.enabled", True),
    ("tensor_parallel.autotp_size", 2), ("sequence_parallel_size", 2), ("disable_python_gc", True), ("disable_allgather", True),
    ("managed_gradient_accumulation", False), ("bf16.immediate_grad_update", True), ("checkpoint.load_universal", True),
    ("checkpoint.use_node_local_storage", True), ("aio.block_size", 1024))]
IGNORED += [Wrong(f"zero_optimization.{key}", {"zero_optimization": {"stage": 1, key: value}}) for key, value in (
    ("overlap_comm", True), ("offload_optimizer", {"device": "cpu"}), ("stage3_max_live_parameters", 1000),
    ("zero_quantized_gradients", True))]
IGNORED += [Wrong("activation_checkpoint_interval", call="activation_checkpoint_interval=1", shows="1")]

DECOUPLED = [Wrong(f"decoupled.{name}", {f"decoupled.{name}": value}) for name, value in (
    ("method", "perta"), ("method", 3), ("stages", 0), ("stages", "block"), ("stages", 10**9), ("stages", [0, 3]),
    ("stages", 1),
    ("stages", 2.5), ("hops", [10**9, 10**9]), ("hops", [1, 10**9]), ("hops", [1]), ("hops", ["1", "1"]), ("queue", 0),
    ("queue", 10**9), ("window", 2), ("partition", [0, 3]), ("partition", "size"), ("timeout", 0), ("timeout", INF),
    ("timeout", "600"), ("stage_lr", [1.0]), ("stage_lr", [-1.0] * 7), ("stage_lr", [NAN] * 7), ("track_gradients", "1"),
    ("codec", "fp4"), ("codec", 8), ("compile", "yes"), ("split_backward", 1), ("lr_by_delay", -1), ("recover", "guess"))]
DECOUPLED += [
    Wrong("decoupled", {"decoupled": "petra"}),
    Wrong("decoupled.method", {"decoupled": {"stages": 2}}),
    Wrong("decoupled", {"decoupled.stagse": 2}, "stagse"),
    *[Wrong(f"decoupled.{name}", {"decoupled.method": "dgl", f"decoupled.{name}": value}) for name, value in (
        ("window", 0), ("window", 10**9), ("window", 8), ("head", "mpl"), ("input_shape", []), ("input_shape", [0, 8, 8]),
        ("input_shape", [10**9, 10**9]), ("input_shape", [-2, 8, 8]), ("stop_after", [1]), ("head_refresh", 0))],
    *[Wrong(f"decoupled.{name}", {"decoupled.method": "dgl_async", f"decoupled.{name}": value}) for name, value in (
        ("pace", "fast"), ("replay", 5), ("replay.size", 0), ("replay.size", 10**9), ("replay.cap", 0), ("replay.M", 3),
        ("replay.memory", "disk"), ("slow_down", [0.5] * 7), ("slow_down", [1.0]), ("slow_down", [INF] * 7))],
    *[Wrong(f"decoupled.clock.{name}", {"decoupled.method": "dgl_async", "decoupled.pace": "clock",
                                        f"decoupled.clock.{name}": value})
      for name, value in (("seed", "x"), ("durations", [1.0]), ("durations", [0.0] * 7), ("warm_start", 1))],
    *[Wrong(f"decoupled.{name}", {"decoupled.method": "pd_asgd", f"decoupled.{name}": value}) for name, value in (
        ("threads", 2), ("threads", "many"), ("threads.forward", 0), ("threads.forward", 1000), ("threads.backward", 0),
        ("threads.backward", 10**6), ("threads.backward", "two"), ("threads.queue", -1), ("threads.queue", 10**9),
        ("threads.lock", "no"), ("threads.workers", 0), ("pace", "fast"))],
    *[Wrong(f"decoupled.pass_times.{name}", {"decoupled.method": "pd_asgd", "decoupled.pace": "clock",
                                             f"decoupled.pass_times.{name}": value})
      for name, value in (("forward", [1.0]), ("forward", [0.0] * 7), ("backward", [INF] * 7), ("back", [1.0] * 7))],
    *[Wrong(f"decoupled.compile.{name}", {f"decoupled.compile.{name}": value}) for name, value in (
        ("mod", "default"), ("mode", "fast"), ("mode", "reduce-overhead"), ("backend", "eager"), ("dynamic", "yes"))],
    *[Wrong(f"decoupled.codec.{name}", {f"decoupled.codec.{name}": value}) for name, value in (
        ("forwards", "int8"), ("forward", "int9"), ("backward", 8), ("backward", None), ("backward", "vq"),
        ("every_link", True), ("every_link", "yes"))],
    Wrong("decoupled.codec", {"decoupled.codec": "vq"}),
    *[Wrong(f"decoupled.vq.{name}", {"decoupled.codec": {"forward": "vq"}, f"decoupled.vq.{name}": value})
      for name, value in (("groups", 4), ("group", 0), ("group", "8"), ("codebook", 1), ("codebook", 10**9), ("levels", 0),
                          ("decay", 0.0), ("decay", 1), ("decay", NAN), ("every", 0), ("moved", -1.0), ("revive", 1))],
    Wrong("decoupled.vq", {"decoupled.codec": {"forward": "vq"}, "decoupled.vq": 8}),
]

#: Of our own block, under a method for which they would do nothing.
WITHOUT_EFFECT = [
    *[Wrong(f"decoupled.{name}", {f"decoupled.{name}": value}) for name, value in (
        ("queue", 4), ("input_shape", [2, 8, 8]), ("head", "mlp"), ("stop_after", [None] * 7), ("vq", {"levels": 2}))],
    *[Wrong(f"decoupled.{name}", {"decoupled.method": "overlapping", f"decoupled.{name}": value}) for name, value in (
        ("queue", 4), ("recover", "input"), ("split_backward", True), ("head_refresh", 10))],
    *[Wrong(f"decoupled.{name}", {f"decoupled.{name}": value}) for name, value in (
        ("input", "replay"), ("pace", "free"), ("replay", {"cap": 2}), ("clock", {"seed": 1}), ("slow_down", [2.0] * 7),
        ("threads", "auto"), ("pass_times", {"forward": [1.0] * 7}))],
    *[Wrong(f"decoupled.{name}", {"decoupled.method": "pd_asgd", f"decoupled.{name}": value}) for name, value in (
        ("codec", "int8"), ("compile", True), ("track_gradients", 2), ("pass_times", {"forward": [1.0] * 7}),
        ("hops", [1, 1]), ("lr_by_delay", 4))],
    *[Wrong(f"decoupled.{name}", {"decoupled": {"method": "backprop", name: value}}) for name, value in (
        ("stage_lr", [1.0] * 7), ("stage_schedulers", [None] * 7), ("track_gradients", 4), ("codec", "bf16"),
        ("split_backward", True), ("timeout", 60), ("queue", 4), ("compile", True), ("lr_by_delay", 4))],
]

DIFFERENT = [Wrong(setting, of_rank_1=change, shows=shows) for setting, change, shows in (
    ("decoupled.method", {"decoupled.method": "dsp"}, "'dsp' on rank 1"),
    ("gradient_accumulation_steps", {"gradient_accumulation_steps": 2}, "2 on rank 1"),
    ("train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": 2}, "2 on rank 1"),
    ("decoupled.stages", {"decoupled.stages": 3}, "3 on rank 1"),
    ("decoupled.hops", {"decoupled.hops": [0, 1]}, "[0, 1] on rank 1"),
    ("decoupled.codec", {"decoupled.codec": "bf16"}, "'bf16' on rank 1"),
    ("decoupled.split_backward", {"decoupled.split_backward": True}, "True on rank 1"),
    ("decoupled.track_gradients", {"decoupled.track_gradients": 2}, "2 on rank 1"),
    ("decoupled.partition", {"decoupled.partition": "uniform"}, "'uniform' on rank 1"),
    ("optimizer.type", {"optimizer.type": "AdamW", "optimizer.params": {"lr": 0.1}}, "'AdamW' on rank 1"),
    ("optimizer.params.lr", {"optimizer.params.lr": 0.2}, "0.2 on rank 1"),
    ("scheduler.type", {"scheduler": {"type": "WarmupLR", "params": {}}}, "'WarmupLR' on rank 1"),
    ("bf16.enabled", {"bf16": {"enabled": True}}, "True on rank 1"),
    ("gradient_clipping", {"gradient_clipping": 0.5}, "0.5 on rank 1"),
    ("decoupled.method", {"decoupled": LEFT_OUT}, "on rank 1"),
    ("decoupled.method", {"decoupled.method": "petar"}, "'petar'"),
    ("optimizer", {"optimizer": "SGD"}, "'SGD'"),
    ("zero_optimization.stage", {"zero_optimization": {"stage": 1}}, "1 on rank 1"))]
DIFFERENT += [
    Wrong("decoupled.window", {"decoupled.method": "dgl"}, "2 on rank 1", {"decoupled.window": 2}),
    Wrong("decoupled.queue", {"decoupled.method": "dgl"}, "9 on rank 1", {"decoupled.queue": 9}),
    Wrong("deepspeed_config", call="no file on rank 1", shows="no_such_file.json"),
    Wrong("base_seed", call="another seed on rank 1", shows="on rank 1"),
    Wrong("layers", call="fewer layers on rank 1", shows="6 on rank 1"),
]

ONE_RANK = [
    Wrong("optimizer", call="an optimizer that fails on rank 0", shows="no room here"),
    Wrong("optimizer", call="an optimizer that fails on rank 1", shows="no room here"),
    Wrong("scheduler", call="a scheduler that fails on rank 1", shows="no room here"),
    Wrong("", call="a layer that cannot be built on rank 1", shows="no room here"),
    Wrong("", call="a layer that cannot be built on rank 0", shows="no room here"),
    Wrong("optimizer", optimizer("torch.optim.Muon", lr=0.1), "torch.optim.Muon"),
    Wrong("model", call="no pipeline", shows="Linear"),
    Wrong("num_stages", call="num_stages=3", shows="3"),
    Wrong("num_stages", call="num_stages=0", shows="0"),
]

FILES = [Wrong("deepspeed_config", text=content, as_base64=coded) for content, coded in (
    (b"{", False), (b"[1]", False), (b"\xff\xfe\x00", False), (b'{"train_batch_size": 8, "train_batch_size": 9}', False),
    (b"", False), (b'{"a": 1,, }', False), (b"{", True), (b'["petra"]', True))]

GROUPS: dict[str, list[Wrong]] = {
    "batch sizes": SIZES, "the top": TOP, "DeepSpeed's blocks": BLOCKS, "optimizer": OPTIMIZERS, "scheduler": SCHEDULERS,
    "not used by a decoupled engine": IGNORED, "the decoupled block": DECOUPLED,
    "no effect under the method": WITHOUT_EFFECT, "ranks that differ": DIFFERENT,
    "one rank fails": ONE_RANK, "files and texts": FILES,
}
CASES = [case for cases in GROUPS.values() for case in cases]
