"""A DeepSpeed configuration in every form that DeepSpeed takes: dictionary, path, base64 text; JSON or Hjson.

>>> read_json({"train_batch_size": 8})
{'train_batch_size': 8}
>>> read_json(base64.urlsafe_b64encode(b'{train_batch_size: 8  # Hjson\\n}').decode())
{'train_batch_size': 8}

DeepSpeed reads the same in ``deepspeed/runtime/config.py`` (``DeepSpeedConfig``); what it raises does not say what was wrong.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import hjson

from ds_decoupled.errors import ConfigError

SETTING = "deepspeed_config"

Source = str | Path | Mapping[str, Any]


class _DuplicateKeys(Exception):
    """A key stands twice; DeepSpeed refuses it too (``dict_raise_error_on_duplicate_keys``)."""


def read_json(config: Source) -> dict[str, Any]:
    """A DeepSpeed configuration as a dictionary.

    Args:
        config: a dictionary, the path of a JSON or Hjson file (UTF-8, with or without a byte order mark), or the text of one
            in URL-safe base64.

    Raises:
        ConfigError: naming the file or text, if it is none of these, holds no object, or holds a key twice.
    """
    if isinstance(config, dict):
        return config
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, str | Path):
        raise ConfigError(SETTING, config, "a path, a dictionary or base64 text is needed",
                          'For example "ds_configs/petra.json".')
    path = Path(config)
    if _is_file(path):
        try:
            return _parse(str(config), path.read_bytes().decode("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(SETTING, str(config), f"a JSON file is needed, and this is none: {error}",
                              "Save it as UTF-8 text that this process may read.") from error
    text = _from_base64(config) if isinstance(config, str) else None
    if text is None:
        what = "it is a folder" if _is_folder(path) else "there is no such file"
        raise ConfigError(SETTING, str(config), f"a path to a JSON file is needed, and {what}", "Is the path right?")
    return _parse(_shortened(str(config)), text)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # base64 text is longer than a name may be
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _from_base64(text: str) -> str | None:
    """What ``text`` stands for; None where it is not base64 of anything that looks like a configuration."""
    try:
        decoded = base64.b64decode(text, altchars=b"-_", validate=True).decode("utf-8-sig")
    except (binascii.Error, ValueError):  # UnicodeDecodeError is one
        return None
    return decoded if "{" in decoded or ":" in decoded else None


def _parse(name: str, text: str) -> dict[str, Any]:
    if not text.strip():  # no settings at all, to Hjson
        raise ConfigError(SETTING, name, "a JSON object is needed, and there is nothing in it", "Is it the right file?")
    try:
        loaded = json.loads(text, object_pairs_hook=_without_duplicates)
    except _DuplicateKeys as error:
        raise _duplicate(name, error) from error
    except json.JSONDecodeError as strict:
        try:
            loaded = hjson.loads(text, object_pairs_hook=_without_duplicates)
        except _DuplicateKeys as error:
            raise _duplicate(name, error) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(SETTING, name, f"a JSON file is needed, and this is none: {strict}; as Hjson: {error}",
                              "Look at the place named.") from error
    except RecursionError as error:
        raise ConfigError(SETTING, name, "a JSON file is needed, and this nests too deeply", "Look for brackets.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(SETTING, name, f"a JSON object at the top, and this is a {type(loaded).__name__}",
                          "Put the settings between { and }.")
    return loaded


def _duplicate(name: str, error: _DuplicateKeys) -> ConfigError:
    return ConfigError(SETTING, name, f"each key may stand once, and these stand more often: {error}", "Leave one of each.")


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise _DuplicateKeys(", ".join(map(repr, twice)))
    return dict(pairs)
