"""Examples in docstrings say what is so."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import ds_decoupled

RECIPES = Path(__file__).parent.parent / "recipes"
ROOTS = {"ds_decoupled": ds_decoupled.__path__,
         **{name: [str(RECIPES / name)] for name in ("bench", "data", "lm", "run", "studies")}}
MODULES = sorted(module.name for root, path in ROOTS.items() for module in pkgutil.walk_packages(path, f"{root}."))


def test_there_are_some() -> None:
    finder = doctest.DocTestFinder()
    assert sum(bool(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name))) > 30


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
