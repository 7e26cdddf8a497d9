"""From a pipeline's ranks back to a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_decoupled.collectives import gather
from ds_decoupled.errors import ConfigError
from ds_decoupled.models.hugging_face.adapters import adapters, merged
from ds_decoupled.models.hugging_face.anatomy import skeleton
from ds_decoupled.models.hugging_face.conversion import Conversion
from ds_decoupled.models.hugging_face.names import as_in_files
from ds_decoupled.models.hugging_face.parts import EmbeddingPart, HeadPart, Part
from ds_decoupled.models.hugging_face.weights import GENERATION, INDEX, SINGLE

_LEFT_BY_OTHERS = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?|adapter_(config\.json|model\.(safetensors|bin))")
"""What an earlier export may have left that ``from_pretrained`` would read instead of a new one, or beside it."""


def to_hugging_face(engine: Any, path: str | Path, *, merge_adapters: bool = True, dtype: torch.dtype | str | None = None,
                    max_shard_size: int | str = "50GB") -> None:
    """Write the model of ``engine`` as a Hugging Face checkpoint; every rank must call it, and each writes its own layers.

    Weights are written as they are now, under the names and in the layout that ``save_pretrained`` of this architecture writes,
    with its configurations of the model and of generation; call ``drain()`` before, so that every stage has made the same
    updates. Weights that an earlier export left in the folder are taken away.

    Args:
        engine: one that trains the layers of :func:`from_hugging_face` on any number of ranks.
        path: a folder; made if it is not there.
        merge_adapters: with LoRA: add the adapters into the weights, for ``AutoModelForCausalLM.from_pretrained``. Otherwise
            write the adapters alone, for ``PeftModel.from_pretrained``.
        dtype: of the weights: a type, ``"source"`` for that of the checkpoint which was read, or None for the one in which the
            engine holds them.
        max_shard_size: of a file, in bytes or as "5GB"; a rank has at least one of its own.

    Raises:
        ConfigError: if the model did not come from :func:`from_hugging_face`, on every rank.
        OSError: if any rank could not write, on every rank.
    """
    folder = Path(path)
    # Of a tied pair every rank that holds one end has built both.
    ends = ((EmbeddingPart, engine.is_first_stage()), (HeadPart, engine.is_last_stage()))
    unused = tuple(kind for kind, used in ends if not used)
    parts = [part for part in engine.module.modules() if isinstance(part, Part) and not isinstance(part, unused)]
    if not all(gather(bool(parts))):
        raise ConfigError("model", type(engine.module).__name__, "its layers are not those of from_hugging_face()")
    conversion = parts[0].conversion
    if conversion.peft_config is not None and not merge_adapters:
        _write_adapters(engine, parts, folder)
        return
    untied = any(gather(any(map(_unties, parts))))
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= _tensors(part, untied, conversion.source_dtype if dtype == "source" else dtype)
    tensors = as_in_files(skeleton(conversion.model_class, conversion.config), tensors)
    kind = next(t.dtype for t in tensors.values() if t.is_floating_point())
    files = _files(engine, tensors, max_shard_size)
    _write(folder, files)
    sizes = gather({name: (file, t.nbytes) for file, own in files.items() for name, t in own.items()})
    if dist.get_rank() == 0:
        found = {name: entry for part in sizes for name, entry in part.items()}
        names = {file for file, _ in found.values()}
        _remove_others(folder, names)
        if names != {SINGLE}:
            index = {"metadata": {"total_size": sum(size for _, size in found.values())},
                     "weight_map": {name: file for name, (file, _) in sorted(found.items())}}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        _write_configurations(conversion, folder, kind, untied)
    dist.barrier()


def _unties(part: Part) -> bool:
    """Whether the unembedding is written, though the original's is its embedding."""
    anatomy = part.conversion.anatomy
    if not isinstance(part, HeadPart) or not anatomy.tied:
        return False
    adapted = hasattr(part.root.get_submodule(anatomy.output_weight.rpartition(".")[0]), "get_delta_weight")
    return part.conversion.untied or adapted


def _tensors(part: Part, untied: bool, dtype: Any) -> dict[str, Tensor]:
    """The weights of ``part``; of tied ones only one, unless the ends are untied: ``transformers`` then ties nothing."""
    values = {name: t.detach().contiguous().cpu() for name, t in merged(part.root).items()}
    anatomy = part.conversion.anatomy
    if isinstance(part, HeadPart) and anatomy.tied and not untied:
        del values[anatomy.output_weight]
    for name in part.conversion.tied_inside(values):
        if untied:
            values[name] = values[name].clone()
        else:
            del values[name]
    return {name: t.to(dtype) if dtype is not None and t.is_floating_point() else t for name, t in values.items()}


def _files(engine: Any, tensors: dict[str, Tensor], max_shard_size: int | str) -> dict[str, dict[str, Tensor]]:
    """This rank's tensors by file; files are numbered over all ranks, and a replica has none."""
    from huggingface_hub import split_torch_state_dict_into_shards

    shards: list[list[str]] = []
    if engine.grid.get_data_parallel_rank() == 0:
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
        shards = list(split.filename_to_tensors.values())
    counts = gather(len(shards))
    first, count = sum(counts[:dist.get_rank()]), sum(counts)
    return {SINGLE if count == 1 else f"model-{first + i:05d}-of-{count:05d}.safetensors": {name: tensors[name] for name in own}
            for i, own in enumerate(shards, start=1)}


def _write_configurations(conversion: Conversion, folder: Path, dtype: torch.dtype, untied: bool) -> None:
    config = copy.deepcopy(conversion.config)
    config.architectures = [conversion.model_class.__name__]
    config.dtype = dtype
    if untied:
        config.get_text_config().tie_word_embeddings = False
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    # As it was: transformers refuses to save again much of what it loads.
    (folder / GENERATION).write_text(conversion.generation.rstrip() + "\n")


def _remove_others(folder: Path, written: set[str]) -> None:
    """Another number of ranks has other files: what is not of this export would be loaded in its place."""
    for file in folder.iterdir():
        if file.name not in written and _LEFT_BY_OTHERS.fullmatch(file.name):
            file.unlink()


def _write(folder: Path, files: dict[str, dict[str, Tensor]]) -> None:
    """Write one rank's files; an error on one rank is an error on all."""
    from safetensors.torch import save_file

    failure, filename = None, ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for filename, tensors in files.items():
            # Under another name until it is whole: what breaks off leaves the earlier file.
            save_file(tensors, folder / f"{filename}.part", metadata={"format": "pt"})
            os.replace(folder / f"{filename}.part", folder / filename)
    except Exception as error:
        failure = f"rank {dist.get_rank()} could not write {folder / filename}: {error}"
    failures = [text for text in gather(failure) if text]
    if failures:
        raise OSError(failures[0])


def _write_adapters(engine: Any, parts: list[Part], folder: Path) -> None:
    """All adapters in one file, from rank 0: they are small."""
    own: dict[str, Tensor] = {}
    if engine.grid.get_data_parallel_rank() == 0:
        for part in parts:
            own |= {name: t.contiguous().cpu() for name, t in adapters(part.root).items()}
    everything: dict[str, Tensor] = {}
    for some in gather(own):
        everything |= some
    _write(folder, {"adapter_model.safetensors": everything} if dist.get_rank() == 0 else {})
    if dist.get_rank() == 0:
        config = copy.deepcopy(parts[0].conversion.peft_config)
        config.inference_mode = True
        config.save_pretrained(folder)
    dist.barrier()


