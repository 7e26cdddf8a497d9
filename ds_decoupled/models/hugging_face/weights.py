"""Where weights come from: a folder of safetensors, of which only what is asked for is read, or a model in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ds_decoupled.errors import ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
    """A checkpoint folder as ``save_pretrained`` writes it.

    Args:
        folder: holds ``model.safetensors``, or several files and their index.
        prefix: of the names in a model with a head; checkpoints of a model without one leave it out.
        aliases: names that may be missing, and under which other name the same tensor is found (tied weights).

    Raises:
        ConfigError: if the folder holds no safetensors.
    """

    def __init__(self, folder: Path, prefix: str, aliases: dict[str, str]) -> None:
        self.folder, self.prefix, self.aliases = folder, prefix, aliases
        self.files: dict[str, str] = {}
        if (folder / INDEX).is_file():
            with _readable(folder / INDEX):
                self.files = dict(json.loads((folder / INDEX).read_text())["weight_map"])
        elif (folder / SINGLE).is_file():
            with _opened(folder / SINGLE) as file:
                self.files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise ConfigError("model", str(folder), f"the folder has neither {SINGLE} nor {INDEX}",
                              "Save it with save_pretrained() of transformers, which writes safetensors.")

    def _stored(self, name: str) -> str:
        short = name.removeprefix(f"{self.prefix}.")
        for candidate in (name, short, f"{self.prefix}.{name}"):
            if candidate in self.files:
                return candidate
        if name in self.aliases:
            return self._stored(self.aliases[name])
        raise ConfigError("model", str(self.folder), f"the checkpoint has no tensor {name}",
                          "Is it a checkpoint of this architecture? Saving it again with this version of transformers renames "
                          "what was renamed.")

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Open the files that hold ``names``, and read these tensors alone."""
        stored = {name: self._stored(name) for name in names}
        values: dict[str, Tensor] = {}
        for filename in sorted({self.files[s] for s in stored.values()}):
            with _opened(self.folder / filename) as file:
                values |= {name: file.get_tensor(s) for name, s in stored.items() if self.files[s] == filename}
        return values


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
