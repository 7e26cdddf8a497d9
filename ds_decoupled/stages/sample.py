"""What stages take and give, seen on a blank sample that passes through all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_decoupled.collectives import gather
from ds_decoupled.errors import ConfigError
from ds_decoupled.passes import NoBatch, Passes, as_in_evaluation
from ds_decoupled.stages.stage import Stage
from ds_decoupled.tensors import Form, Tensors, as_tuple, form_of, map_tensors, to_device


@dataclass(frozen=True)
class Shapes:
    """Of a blank sample.

    Attributes:
        taken, given: what each stage here takes and gives.
        forms: of what each layer of the model gives.
        outputs: the size of the last dimension of what the last stage gives.
    """

    taken: Mapping[int, Tensors]
    given: Mapping[int, Tensors]
    forms: Sequence[Form]
    outputs: int


def shapes_of(stages: Mapping[int, Stage], passes: Passes, module: Any, input_shape: Sequence[int] | None, micro_batch: int,
              dtype: torch.dtype, device: torch.device) -> Shapes:
    """Pass a blank sample through all ranks' stages. A collective call.

    Args:
        stages: this rank's, by number.
        passes: the way through all ranks' stages.
        module: the pipeline module.
        input_shape: of one sample, where the JSON gives it.
        micro_batch: samples in a micro-batch.
        dtype: the layers' floating-point type.
        device: where the layers are.

    Raises:
        ConfigError: on every rank, if no sample is known, or none passes.
    """
    complaints: list[str] = []
    for sample in samples_of(module, input_shape, micro_batch, dtype):
        shapes, complaint = _pass(stages, passes, sample, device)
        if complaint is None:
            return shapes
        complaints.append(complaint)
    raise ConfigError("decoupled.input_shape", input_shape, "; ".join(complaints), "Is it the shape of one of its inputs? "
                      "Where it does not say enough, give DecoupledPipelineModule a sample_input.")


def samples_of(module: Any, input_shape: Sequence[int] | None, micro_batch: int, dtype: torch.dtype) -> list[Tensors]:
    """Inputs of the first layer, to be tried in this order: the module's own sample, or those of the shape that the JSON gives.

    The shape does not say the type. Token ids come first where samples have one dimension, numbers elsewhere; then the other.

    Args:
        module: the pipeline module.
        input_shape: of one sample.
        micro_batch: samples in a micro-batch.
        dtype: the layers' floating-point type.

    Raises:
        ConfigError: where there is neither, or the two do not agree.
    """
    sample: Tensors | None = getattr(module, "sample_input", None)
    if sample is not None:
        own = list(as_tuple(sample)[0].shape[1:])
        if input_shape is not None and list(input_shape) != own:
            raise ConfigError("decoupled.input_shape", list(input_shape), f"the pipeline module's sample_input has samples of "
                              f"{own}, and shapes are taken from that", "Leave it out, or let the two agree.")
        return [sample]
    if input_shape is None:
        raise ConfigError("decoupled.input_shape", None, "heads and AuxNets are built from the shapes of what stages give, "
                          "and no input is known", "Give one sample's shape, such as [3, 32, 32] (or [128] for 128 token ids "
                          "or features), or DecoupledPipelineModule a sample_input.")
    numbers = list(dict.fromkeys((torch.float32, dtype)))
    order = [torch.long, *numbers] if len(input_shape) == 1 else [*numbers, torch.long]
    return [torch.zeros(micro_batch, *input_shape, dtype=kind) for kind in order]


def _pass(stages: Mapping[int, Stage], passes: Passes, sample: Tensors, device: torch.device) -> tuple[Shapes, str | None]:
    """Pass ``sample`` through all ranks' stages. A collective call; what went wrong on any rank is told in words."""
    taken: dict[int, Tensors] = {}
    given: dict[int, Tensors] = {}
    forms: list[Form] = []

    def through(stage: Stage, x: Tensors, beside: list[Any]) -> Tensors:
        taken[stage.index] = map_tensors(torch.clone, x)
        try:
            with stage.listening(lambda layer, taken, made: forms.append(form_of(made))):
                given[stage.index] = map_tensors(torch.clone, stage.plain_forward(0, x))
        except Exception as error:
            kinds = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in as_tuple(x)]
            raise ValueError(f"a blank sample, {', '.join(kinds)}, does not pass: {error}") from error
        return given[stage.index]

    complaint: str | None = None
    passes.expect("evaluation", 1)
    try:
        with torch.no_grad(), as_in_evaluation(stages.values()):
            passes.forward("evaluation", 0, lambda: (to_device(sample, device), None), through, tell=True)
    except NoBatch as missing:
        complaint = str(missing.error)
    except ValueError as error:
        complaint = str(error)
    passes.network.wait_until_taken("evaluation")
    outputs = next((as_tuple(given[s])[0].shape[-1] for s, stage in stages.items() if stage.is_last and s in given), None)
    told = gather((complaint, outputs, forms, min(given, default=0)))
    first = next((told_complaint for told_complaint, *_ in told if told_complaint is not None), None)
    # By pipeline, of which all ranks' are alike: those of one go up from its first stage.
    by_stage = {bottom: rank_forms for *_, rank_forms, bottom in told}
    forms = [form for _, rank_forms in sorted(by_stage.items()) for form in rank_forms]
    return Shapes(taken, given, forms, next((n for _, n, *_ in told if n is not None), 0)), first
