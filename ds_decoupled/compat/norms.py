"""Over which ranks DeepSpeed's optimizers take a gradient's norm, and what it was."""

from __future__ import annotations

from typing import Any

from deepspeed.pipe import PipelineModule


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


def norm_of_last_step(optimizer: Any) -> float | None:
    """The gradient norm before clipping that a bf16 or ZeRO optimizer saw in its last step; None where it took none."""
    norm: float | None = optimizer._global_grad_norm
    return norm
