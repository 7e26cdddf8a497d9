"""Every private name of DeepSpeed 0.19 that this package touches, and the functions and classes that touch them.

The rest of the package sees the public methods of the two base classes and the functions below. A test finds what is touched
and compares it with :data:`PRIVATE_NAMES`.
"""

from ds_decoupled.compat.engine import (
    GuardedPipelineEngine,
    PipelineEngineBase,
    around_instructions,
    engine_class,
)
from ds_decoupled.compat.module import (
    PipelineModuleBase,
    built_parameters,
    check_runs_by_layers,
    hooks_of,
    layer_parameters,
    layer_specs,
)
from ds_decoupled.compat.names import PRIVATE_NAMES
from ds_decoupled.compat.norms import clip_over_all_stages, norm_of_last_step, norms_within_stages

__all__ = ["PRIVATE_NAMES", "GuardedPipelineEngine", "PipelineEngineBase", "PipelineModuleBase", "around_instructions",
           "built_parameters", "check_runs_by_layers", "clip_over_all_stages", "engine_class", "hooks_of",
           "layer_parameters", "layer_specs", "norm_of_last_step", "norms_within_stages"]
