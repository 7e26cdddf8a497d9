"""Where weights come from: a folder of safetensors, of which only what is asked for is read, or a model in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ds_decoupled.errors import ConfigError
from ds_decoupled.models.hugging_face.anatomy import Anatomy
from ds_decoupled.models.hugging_face.folder import check_folder
from ds_decoupled.models.hugging_face.names import Group, Naming

INDEX, SINGLE, GENERATION = "model.safetensors.index.json", "model.safetensors", "generation_config.json"


class Source(Protocol):
    """Gives tensors by their names in the model."""

    def read(self, names: Sequence[str]) -> dict[str, Tensor]: ...


class InMemory:
    """A model that is there already.

    Args:
        model: of ``transformers``; it is kept, and its weights are copied when a layer is built.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Copies are the caller's business."""
        state = self.model.state_dict()
        return {name: state[name] for name in names}


class SafetensorsFolder:
    """A checkpoint folder as ``save_pretrained`` writes it, or as it is on the hub: with the names and layouts of files.

    All that its files tell of themselves is looked at when this is made; tensors are read layer by layer.

    Args:
        folder: holds ``model.safetensors``, or several files and their index.
        model: without weights.
        anatomy: how it is cut.
        encoder: whether by its configuration the folder holds an encoder and a decoder.

    Raises:
        ConfigError: if the folder holds no safetensors, lacks some or holds broken ones, or tensors of another model.
    """

    def __init__(self, folder: Path, model: Any, anatomy: Anatomy, *, encoder: bool = False) -> None:
        self.folder, self.model = folder, model
        self.files = _files(folder)
        self.naming = Naming(model, self.files)
        self.tied = _tied(model, anatomy)
        check_folder(folder, model, anatomy, self.naming, self._headers(), encoder=encoder)

    def _headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every tensor; every file is opened."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for filename in sorted(set(self.files.values())):
            with _opened(self.folder / filename) as file:
                slices = {name: file.get_slice(name) for name in list(file.keys())}
                found |= {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        if absent := next((name for name in self.files if name not in found), None):
            raise ConfigError("model", str(self.folder / self.files[absent]), f"it lacks {absent}, which {INDEX} says is there",
                              "Is it whole? Get it again.")
        return found

    def _group(self, name: str) -> tuple[str, Group]:
        for candidate in (name, *self.tied.get(name, ())):
            if candidate in self.naming.groups:
                return candidate, self.naming.groups[candidate]
        raise ConfigError("model", str(self.folder), f"the checkpoint has no tensor {name}",
                          f"Is it a checkpoint of {type(self.model).__name__}? Its config.json says so.")

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Open the files that hold ``names``, and read what these are made of; a buffer that may be missing may be left out."""
        wanted = {name: self._group(name) for name in names if not self._may_miss(name)}
        stored = {part for _, group in wanted.values() for part, _ in group.stored}
        tensors: dict[str, Tensor] = {}
        for filename in sorted({self.files[name] for name in stored}):
            with _opened(self.folder / filename) as file:
                tensors |= {name: file.get_tensor(name) for name in sorted(stored) if self.files[name] == filename}
        made: dict[int, dict[str, Tensor]] = {}
        for _, group in wanted.values():
            if id(group) not in made:
                made[id(group)] = group.convert(tensors, self.model)
        return {name: made[id(group)][there] for name, (there, group) in wanted.items()}

    def _may_miss(self, name: str) -> bool:
        """Buffers that are computed, as old checkpoints have it."""
        ignored = self.model._keys_to_ignore_on_load_missing or ()
        return (name not in self.naming.groups and name not in dict(self.model.named_parameters())
                and any(re.search(pattern, name) for pattern in ignored))


def _files(folder: Path) -> dict[str, str]:
    """Which file has which tensor."""
    if (folder / SINGLE).is_file():  # transformers takes it first, too
        with _opened(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), SINGLE)
    if (folder / INDEX).is_file():
        with _readable(folder / INDEX):
            return dict(json.loads((folder / INDEX).read_text())["weight_map"])
    raise ConfigError("model", str(folder), f"the folder has neither {SINGLE} nor {INDEX}",
                      "Save it with save_pretrained() of transformers, which writes safetensors.")


def _tied(model: Any, anatomy: Anatomy) -> dict[str, list[str]]:
    """Names of one tensor: of these a file may have any one."""
    pairs = list(getattr(model, "all_tied_weights_keys", {}).items())
    if anatomy.tied:
        pairs.append((anatomy.output_weight, anatomy.input_weight))
    found: dict[str, list[str]] = {}
    for one, other in pairs:
        found.setdefault(one, []).append(other)
        found.setdefault(other, []).append(one)
    return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What is raised for a file that is missing, cut off or none is one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("model", str(path), f"it cannot be read ({reason})", "Is it whole? Get it again.") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    with _readable(path), safe_open(path, framework="pt") as file:
        yield file
