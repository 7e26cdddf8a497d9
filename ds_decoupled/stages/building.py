"""Building a rank's stages from its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_decoupled.collectives import from_rank
from ds_decoupled.compat import PipelineModuleBase
from ds_decoupled.config import DecoupledConfig
from ds_decoupled.layer_seeding import layer_seeding
from ds_decoupled.schedules import Placement
from ds_decoupled.stages.autocast import Autocast
from ds_decoupled.stages.auxiliary import AuxiliaryStage
from ds_decoupled.stages.compiled import check_compiler, compile_layers, outlives_updates
from ds_decoupled.stages.layerwise import LayerwiseStage
from ds_decoupled.stages.local import LocalStage
from ds_decoupled.stages.randomness import LayerSeeds, drawn_seed
from ds_decoupled.stages.stage import Shared, Stage
from ds_decoupled.stages.threaded import ThreadedStage

#: By the value of the ``gradient`` axis.
STAGES: dict[str, type[Stage]] = {"global": Stage, "local": LocalStage, "auxiliary": AuxiliaryStage}

#: By the pace, where the update is layer-wise.
LAYERWISE: dict[str, type[Stage]] = {"clock": LayerwiseStage, "free": ThreadedStage}


def seeds_of(module: Any, grid: Any, device: Any) -> LayerSeeds:
    """The layers' seeds. A collective call."""
    # A plain module's base_seed is a constant that nobody chose.
    chosen = module.base_seed if isinstance(module, PipelineModuleBase) else None
    base = from_rank(0, drawn_seed()) if chosen is None else chosen
    return LayerSeeds(base, grid.get_data_parallel_rank(), device, layer_seeding(module))


def build_stages(module: Any, rank: int, placement: Placement, config: DecoupledConfig, seeds: LayerSeeds,
                 autocast: Callable[[], Autocast]) -> dict[int, Stage]:
    """The stages of pipe rank ``rank``, by number; heads come later.

    Args:
        module: the pipeline module, built and on its device.
        rank: whose layers ``module`` has.
        placement: stages and their ranks.
        config: the ``decoupled`` block.
        seeds: of the layers.
        autocast: how layers run; called once, and may refuse.

    Raises:
        ConfigError: for a compiler that cannot work here, and what ``autocast`` refuses.
    """
    axes, start = config.axes(), placement.rank_layer_bounds[rank]
    compiled = config.compile_settings()
    if compiled is not None:
        check_compiler(compiled, seeds.device)
        compile_layers(module.forward_funcs, compiled, outlives_updates(axes))
    shared = Shared(axes, placement.stages, module.loss_fn, seeds, autocast(), config.losses == "farthest",
                    config.transport, config.auxnet, module.get_additional_losses)
    kind = LAYERWISE[axes.pace] if axes.layerwise else STAGES[axes.gradient]
    stages: dict[int, Stage] = {}
    for index in placement.stages_of(rank):
        layers = placement.layers_of(index)
        # Only the lowest stage sends its gradient to another rank, which then need not wait for the weights'.
        puts_off = config.split_backward and rank > 0 and not stages
        stages[index] = kind(index, module.forward_funcs[layers.start - start:layers.stop - start], layers.start, shared,
                             split_backward=puts_off)
    return stages
