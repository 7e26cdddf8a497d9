"""Arrows between modules go one way: read from the source, lazy imports and those for types alike."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import ds_decoupled

ROOT = Path(ds_decoupled.__file__).parent


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """Every module below ``root``, by its dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [package, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(source: str, known: Iterable[str]) -> set[str]:
    """Names of all modules that ``source`` imports anywhere: of ``known`` the module itself, of others the top package."""
    known, found = set(known), set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative imports hide where a name comes from"
            # "from package import module" is an import of the module, not of the package
            names = [f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names]
        found |= {name if name in known else name.split(".")[0] for name in names}
    return found


MODULES = modules_of(ROOT, "ds_decoupled")
IMPORTS = {name: imports_of(path.read_text(), MODULES) for name, path in MODULES.items()}


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    """Modules that import one another in a circle, if there are any."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name):], name]
        if name in done or name not in imports:
            return None
        found = next((c for other in sorted(imports[name]) if (c := visit(other, [*path, name]))), None)
        done.add(name)
        return found

    return next((c for name in sorted(imports) if (c := visit(name, []))), None)


def reached_from(name: str) -> Iterator[str]:
    """All that ``name`` imports, directly or not."""
    seen, todo = set(), [name]
    while todo:
        for other in IMPORTS.get(todo.pop(), ()):
            if other not in seen:
                seen.add(other)
                todo.append(other)
                yield other


def test_no_circle() -> None:
    # The package's own __init__ names modules for type checkers alone, and loads them when they are asked for.
    assert circle({name: imports for name, imports in IMPORTS.items() if name != "ds_decoupled"}) is None


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from x import y\ndef f():\n    import z\n"
    assert imports_of(lazy, {"x.y", "z"}) == {"typing", "x.y", "z"}


@pytest.mark.parametrize("room", ["schedules", "analysis"])
def test_plans_need_no_torch(room: str) -> None:
    inside = [name for name in MODULES if name.startswith(f"ds_decoupled.{room}")]
    assert len(inside) > 3
    for name in inside:
        assert not {"torch", "deepspeed"} & set(reached_from(name)), name


def test_the_engine_knows_no_model() -> None:
    reached = set(reached_from("ds_decoupled.engine"))
    assert "ds_decoupled.stages.stage" in reached and not any(name.startswith("ds_decoupled.models") for name in reached)


def test_arrows_between_rooms() -> None:
    """recipes -> engine -> runners -> stages -> (schedules, links, optim) -> nn: no room imports one before it."""
    order = ["ds_decoupled.engine", "ds_decoupled.construction", "ds_decoupled.runners", "ds_decoupled.stages",
             "ds_decoupled.optim", "ds_decoupled.links", "ds_decoupled.schedules"]
    for name, imports in IMPORTS.items():
        place = next((i for i, room in enumerate(order) if name == room or name.startswith(f"{room}.")), None)
        for other in imports if place is not None else ():
            later = next((i for i, room in enumerate(order) if other == room or other.startswith(f"{room}.")), None)
            assert later is None or later >= place, f"{name} imports {other}"


def test_nobody_reads_anothers_underscore_names() -> None:
    """``other._name`` is for the object itself (``self``, ``cls``) and for torch's and DeepSpeed's, of which compat has the
    latter; ours are read by their own file alone."""
    ours: dict[str, set[str]] = {}
    trees = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and _private(node.name):
                ours.setdefault(node.name, set()).add(name)
            if isinstance(node, ast.Attribute) and _private(node.attr) and _of_itself(node) and isinstance(node.ctx, ast.Store):
                ours.setdefault(node.attr, set()).add(name)
    wrong = [f"{name}:{node.lineno} {node.attr}" for name, tree in trees.items() for node in ast.walk(tree)
             if isinstance(node, ast.Attribute) and node.attr in ours and not _of_itself(node) and name not in ours[node.attr]]
    assert not wrong


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _of_itself(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") or (
        isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name) and node.value.func.id == "super")


def test_what_the_docs_name_is_reached_by_one_import() -> None:
    """In a process that has imported nothing else."""
    pages = [ROOT.parent / "README.md", *sorted((ROOT.parent / "docs").glob("*.md"))]
    dotted = re.compile(r"\bds_decoupled(?:\.[A-Za-z_]\w*)+(?!\.\w|/)")
    names = sorted({name for page in pages for name in dotted.findall(page.read_text())})
    assert "ds_decoupled.nn.mark_block" in names
    wrong = "try:\n    ds_decoupled.nothing\n    raise SystemExit('no error')\nexcept AttributeError:\n    pass\n"
    done = subprocess.run([sys.executable, "-c", "import ds_decoupled\n" + wrong + "\n".join(names)], capture_output=True,
                          text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
