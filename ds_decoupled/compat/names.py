"""The list of DeepSpeed's private names: what may be touched, and nowhere but in this folder.

Private is what begins with an underscore, and what is written into DeepSpeed's modules and objects from outside.
"""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

#: By owner: the module, the class, or the function that looks for the name.
PRIVATE_NAMES: dict[Any, tuple[str, ...]] = {
    deepspeed: ("PipelineEngine",),
    PipelineModule: ("_backward_hooks", "_backward_pre_hooks", "_build", "_count_layer_params", "_forward_hooks",
                     "_forward_pre_hooks", "_layer_specs", "_local_start", "_partition_layers", "_set_bounds", "_topo"),
    PipelineEngine: ("_INSTRUCTION_MAP", "_backward_post_hook", "_bcast_pipe_scalar", "_config",
                     "_configure_distributed_model", "_configure_lr_scheduler", "_configure_optimizer", "_do_sanity_check",
                     "_exec_schedule", "_reduce_non_expert_gradients", "_reduce_outputs", "_scheduler_from_config"),
    DeepSpeedConfig: ("scheduler_name", "scheduler_params"),
    PipelineParallelGrid: ("ds_model_proc_group", "ds_model_rank", "ds_model_world_size"),
    BF16_Optimizer: ("_global_grad_norm",),
    DeepSpeedZeroOptimizer: ("_global_grad_norm",),
    is_model_parallel_parameter: ("model_parallel",),
}
