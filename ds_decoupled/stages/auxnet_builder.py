"""Giving the stages of all ranks their steps of the AuxNet: a blank sample passes through, and shows shapes and costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ds_decoupled.collectives import averaging, gather, together
from ds_decoupled.config import DecoupledConfig
from ds_decoupled.nn.adjoint import Adjoint
from ds_decoupled.nn.auxnet import build_step, check_step, multiply_adds, never_negative, own_step
from ds_decoupled.passes import Passes, as_in_evaluation
from ds_decoupled.stages.auxiliary import AuxiliaryStage
from ds_decoupled.stages.randomness import LayerSeeds, mix, seeded
from ds_decoupled.stages.sample import shapes_of
from ds_decoupled.stages.stage import Stage
from ds_decoupled.tensors import Tensors, as_tuple


def build_auxnet(stages: Mapping[int, Stage], passes: Passes, module: Any, config: DecoupledConfig, *, seeds: LayerSeeds,
                 replicas: Any, micro_batch: int, dtype: torch.dtype) -> None:
    """Give this rank's stages their steps; nothing where inputs are not generated. A collective call.

    Args:
        stages: this rank's, by number.
        passes: the way through all ranks' stages.
        module: the pipeline module.
        config: the ``decoupled`` block.
        seeds: of the layers.
        replicas: the group of data-parallel replicas; None for one.
        micro_batch: samples in a micro-batch.
        dtype: the layers' floating-point type.

    Raises:
        ConfigError: on every rank, if any step cannot be built.
    """
    own = {index: stage for index, stage in stages.items() if isinstance(stage, AuxiliaryStage) and stage.shared.stages > 1}
    if not any(gather(len(own))):
        return
    shapes = shapes_of(stages, passes, module, config.input_shape, micro_batch, dtype, seeds.device)
    average = averaging(replicas)

    with torch.no_grad(), as_in_evaluation(stages.values()):
        layers = {index: multiply_adds(stage.plain_forward, 0, shapes.taken[index]) for index, stage in own.items()}
        everywhere = {index: count for part in gather(layers) for index, count in part.items()}
        below = sum(count for index, count in everywhere.items() if index < len(everywhere) - 1)
        # Each step has its part of the share by what its stage costs, so that no stage waits longer than others for its input.
        budget = config.auxnet.share * sum(everywhere.values()) / max(1, below)

        def make() -> None:
            for index, stage in own.items():
                samples = as_tuple(shapes.taken[index])[0].shape[0]
                stage.counted = layers[index] // samples, 0, 0
                if not stage.is_last:
                    _make_step(stage, shapes.taken[index], shapes.given[index], config, budget * layers[index], seeds,
                               shapes.outputs)
                    stage.learn_steps(average)

        together(make)


def _make_step(stage: AuxiliaryStage, inputs: Tensors, outputs: Tensors, config: DecoupledConfig, budget: float,
               seeds: LayerSeeds, classes: int) -> None:
    settings, samples = config.auxnet, as_tuple(inputs)[0].shape[0]
    tokens = next((m.num_embeddings for layer in stage.layers if isinstance(layer, nn.Module) for m in layer.modules()
                   if isinstance(m, nn.Embedding)), 0)
    with seeded(mix(seeds.base, 0x617578, stage.index)):  # "aux"
        if settings.net is not None:
            step = own_step(settings.net, inputs, outputs)
        else:
            step = build_step(inputs, outputs, budget=budget, width=settings.width, blocks=settings.blocks, tokens=tokens)
            # What a stage never gives need not be asked of it: on CIFAR-10 the mismatch halves (docs/auxnet.md).
            step.never_negative = never_negative(lambda x: stage.plain_forward(0, x), inputs)
        parts: list[tuple[nn.Module, Tensors]] = [(step, inputs)]
        if stage.kappa == "predicted":
            body = build_step(outputs, outputs, budget=budget / 2, width=settings.width, blocks=settings.blocks, tokens=0,
                              shortcut=False)
            parts.append((Adjoint(body, outputs, classes), outputs))
        for part, _ in parts:
            part.to(seeds.device).eval()
        check_step(step, settings.net, inputs, outputs)
    counts = [multiply_adds(part, x) // samples for part, x in parts]
    stage.counted = stage.counted[0], counts[0], sum(counts[1:])
    for part, _ in parts:
        part.train()
    stage.step, stage.adjoint = step, parts[1][0] if len(parts) > 1 else None
