"""Giving the stages of all ranks their heads: a blank sample passes through all stages, and shows what each of them gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import logger
from torch import nn

from ds_decoupled.collectives import gather, together
from ds_decoupled.compat import layer_specs
from ds_decoupled.config import DecoupledConfig
from ds_decoupled.links.vector import VectorCodec, check_vectors
from ds_decoupled.nn.heads import SharedReadout, shared_blocks
from ds_decoupled.nn.lens import lens_depth
from ds_decoupled.nn.reconstruction import RECONSTRUCT
from ds_decoupled.passes import Passes
from ds_decoupled.stages.heads import WholeModel, make_head, make_readout
from ds_decoupled.stages.lesson import Lesson
from ds_decoupled.stages.local import LocalStage
from ds_decoupled.stages.randomness import LayerSeeds
from ds_decoupled.stages.sample import shapes_of
from ds_decoupled.stages.stage import Stage
from ds_decoupled.stages.transport import check_transport
from ds_decoupled.tensors import Tensors, as_tuple


class ReadoutRefresh:
    """Brings the ranks' copies of the model's last layer, which shared heads and lenses end in, up to date.

    Args:
        readout: this rank's copy.
        source: the last layer itself, on the rank that has it; None elsewhere.
        every: updates from one refresh to the next.
        grid: DeepSpeed's grid, whose pipe group the layer goes around in.

    Attributes:
        bytes_sent: to other ranks, of which the rank of the last stage sends all.
    """

    def __init__(self, readout: SharedReadout, source: nn.Module | None, every: int, grid: Any) -> None:
        self.readout, self.source, self.every, self.grid = readout, source, every, grid
        self.bytes_sent = 0

    def before_call(self, update: int) -> None:
        """What is due before a call of ``train_batch`` that makes update ``update``. A collective call of a pipeline's ranks,
        which are all at the same tick then, so that the numbers are those of any number of ranks."""
        if update % self.every:
            return
        group, ranks = self.grid.get_pipe_parallel_group(), self.grid.get_pipe_parallel_world_size()
        for name, value in sorted(self.readout.layer.state_dict().items()):
            if self.source is not None:
                value.copy_(self.source.state_dict()[name])
            if ranks > 1:
                dist.broadcast(value, self.grid.stage_to_global(ranks - 1), group=group)
                self.bytes_sent += value.nbytes * (ranks - 1) if self.source is not None else 0


def build_heads(stages: Mapping[int, Stage], passes: Passes, module: Any, config: DecoupledConfig, *, grid: Any,
                bounds: Sequence[int], seeds: LayerSeeds, micro_batch: int, dtype: torch.dtype) -> list[ReadoutRefresh]:
    """Give this rank's stages the heads that their losses are taken from; nothing with a global gradient. A collective call.

    Args:
        stages: this rank's, by number.
        passes: the way through all ranks' stages.
        module: the pipeline module.
        config: the ``decoupled`` block.
        grid: DeepSpeed's grid.
        bounds: the layers at which stages begin, and their number.
        seeds: of the layers.
        micro_batch: samples in a micro-batch.
        dtype: the layers' floating-point type.

    Returns:
        What keeps shared heads up to date.

    Raises:
        ConfigError: on every rank, if any head cannot be built.
    """
    local = {index: stage for index, stage in stages.items() if isinstance(stage, LocalStage)}
    if not any(gather(len(local))):
        return []
    shapes = shapes_of(stages, passes, module, config.input_shape, micro_batch, dtype, seeds.device)
    given = shapes.given
    like = next((p for stage in stages.values() for p in stage.parameters if p.is_floating_point()), None)
    specs = layer_specs(module)
    model = WholeModel(specs, bounds, shapes.forms)
    check_transport(config.transport, shapes.forms)

    def make() -> SharedReadout | None:
        _check_codec(given, stages, config, micro_batch)
        ends_in_readout = shared_blocks(config.head) is not None or lens_depth(config.head) is not None
        readout = make_readout(specs, like, seeds.device) if ends_in_readout else None
        for index, stage in local.items():
            if stage.has_loss and not stage.is_last:
                with stage.autocast.forward():
                    stage.head = make_head(config.head, given[index], shapes.outputs, seeds.base, index, like, seeds.device,
                                           model, readout)
                if config.head == RECONSTRUCT:
                    stage.rebuild_input()
        return readout

    readout = together(make)
    _tell_size(local, stages)
    _give_losses(local, module.loss_fn)
    if config.head_teaching is not None:
        for stage in local.values():
            if stage.learns_from_head or stage.head is not None:
                stage.lesson = Lesson(config.head_teaching, still=stage.learns_from_head, has_head=stage.head is not None)
    if readout is None:
        return []
    source = module.forward_funcs[-1] if any(stage.is_last for stage in local.values()) else None
    refresh = ReadoutRefresh(readout, source, config.head_refresh, grid)
    if lens_depth(config.head) is not None:
        refresh.before_call(0)  # the model's as it begins; it stays as it is
        return []
    return [refresh]


def _tell_size(local: Mapping[int, LocalStage], stages: Mapping[int, Stage]) -> None:
    """Warn where more weights of heads learn than the model has, as in copies of a large unembedding. A collective call."""
    own = sum(p.numel() for stage in local.values() for p in stage.head_parameters)
    of_stages = sum(p.numel() for stage in stages.values() for p in stage.parameters)
    heads, model = (sum(counts) for counts in zip(*gather((own, of_stages))))
    if heads > model and any(stage.is_last for stage in local.values()):
        logger.warning('the heads of %d stages have %.3g weights that learn, the whole model has %.3g: fewer stages, or '
                       '"head": "lens", whose readout is one for all and read-only, would take less',
                       local[max(local)].shared.stages, heads, model)


def _check_codec(given: Mapping[int, Tensors], stages: Mapping[int, Stage], config: DecoupledConfig, micro_batch: int) -> None:
    """What stages here give can be quantized, where it will be: known before anything is sent.

    Args:
        given: by stage.
        stages: this rank's.
    """
    if config.codec.forward != VectorCodec.name:
        return
    codec = VectorCodec(**config.vq.model_dump())
    for index, tensors in given.items():
        if stages[index].is_last or (index != max(stages) and not config.codec.every_link):
            continue
        for tensor in as_tuple(tensors):
            shape = micro_batch, *tensor.shape[1:]
            if codec.is_coded(shape, tensor.dtype):
                check_vectors(shape, codec.group, codec.codebook)


def _give_losses(stages: Mapping[int, LocalStage], loss_fn: Any) -> None:
    """A loss with parameters or buffers of its own: every stage with a head gets a copy of the last stage's."""
    if not isinstance(loss_fn, nn.Module) or not loss_fn.state_dict():
        return
    # Each rank made its own; the last stage's is the one that counts.
    told = gather(loss_fn.state_dict() if any(stage.is_last for stage in stages.values()) else None)
    state = next(value for value in told if value is not None)
    for stage in stages.values():
        if stage.head is not None and not stage.rebuilds:
            stage.give_loss(state)
