"""Which private names of other packages a source touches: names with an underscore that it did not make itself, and names that
it writes into a package's modules and classes."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "ds_decoupled"
PRIVATE = re.compile(r"_[A-Za-z]\w*")
#: Of named tuples; they are documented under these names.
STANDARD = {"_asdict", "_fields", "_replace"}
#: What others put on the objects of a class, and look for there.
PUT_ON = {"torch.optim.Optimizer": {"_opt_called"}}  # torch.optim.lr_scheduler


@dataclass(frozen=True, order=True)
class Touch:
    """A private name at a place. ``written``: set from outside, whatever the name begins with."""

    file: str
    line: int
    name: str
    written: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.name}"


def touched(sources: Mapping[str, str], foreign: frozenset[str], inside: str,
            known: frozenset[str] = frozenset()) -> list[Touch]:
    """All touches in ``sources``.

    Args:
        sources: texts by their paths.
        foreign: names of DeepSpeed's objects: DeepSpeed's wherever another object than ``self`` is asked for them, even if a
            class of ours has one of that name.
        inside: the folder where every attribute that is written into another object counts.
        known: names that are touches wherever they are spelled out; others only as an argument of ``getattr`` and its like.
    """
    files = [_file(path, text) for path, text in sources.items()]
    classes: dict[str, list[str]] = {}  # the bases of all classes of a name
    for file in files:
        for name, bases in file.classes:
            classes.setdefault(name, []).extend(bases)
    made = {name for file in files for name in file.made}
    of_class = {name: _foreign_members(name, classes) for name in classes}
    found: set[Touch] = set()
    for file in files:
        for touch, of_self in file.touches(inside, foreign | known):
            members = of_class[of_self] if of_self is not None else foreign
            if touch.name in STANDARD:
                continue
            if touch.written or touch.name in members or touch.name not in made:
                found.add(touch)
    return sorted(found)


@dataclass
class _File:
    path: str
    tree: ast.Module
    imports: dict[str, str] = field(default_factory=dict)  # names in this file to dotted paths
    classes: list[tuple[str, list[str]]] = field(default_factory=list)  # with their bases, dotted
    made: set[str] = field(default_factory=set)
    walked: dict[tuple[str, frozenset[str]], list[tuple[Touch, str | None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            match node:
                case ast.Import():
                    self.imports |= {alias.asname or alias.name.partition(".")[0]:
                                     alias.name if alias.asname else alias.name.partition(".")[0] for alias in node.names}
                case ast.ImportFrom(module=str(module)):
                    self.imports |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
        for node in ast.walk(self.tree):
            match node:
                case ast.ClassDef(name=name, bases=bases):
                    self.classes.append((name, [self.dotted(base) for base in bases]))
                    self.made.add(name)
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    self.made.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    self.made.add(name)

    def dotted(self, node: ast.expr) -> str:
        """``nn.Module`` as ``torch.nn.Module``; empty for what is no such chain of names."""
        match node:
            case ast.Name(id=name):
                return self.imports.get(name, name)
            case ast.Attribute(value=value, attr=attr):
                start = self.dotted(value)
                return f"{start}.{attr}" if start else ""
            case ast.Subscript(value=value):
                return self.dotted(value)
        return ""

    def imported(self, node: ast.expr) -> bool:
        """Whether ``node`` is a module or class of another package, or hangs on one."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return (isinstance(node, ast.Name) and node.id in self.imports
                and not self.imports[node.id].startswith(OURS)
                and self.imports[node.id].partition(".")[0] not in sys.stdlib_module_names)

    def standard(self, node: ast.expr) -> bool:
        """Whether ``node`` comes from Python's own library: ``multiprocessing.current_process()``."""
        while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
            node = node.func if isinstance(node, ast.Call) else node.value
        return isinstance(node, ast.Name) and self.imports.get(node.id, "").partition(".")[0] in sys.stdlib_module_names

    def touches(self, inside: str, known: frozenset[str]) -> list[tuple[Touch, str | None]]:
        """Every private name, and the class of ours whose ``self`` has it, else None."""
        if (inside, known) not in self.walked:
            self.walked[inside, known] = list(self._walk(self.tree, None, self.path.startswith(inside), known))
        return self.walked[inside, known]

    def _walk(self, node: ast.AST, within: str | None, counts_writing: bool,
              known: frozenset[str]) -> Iterator[tuple[Touch, str | None]]:
        line, names, written = getattr(node, "lineno", 0), list[str](), list[str]()
        of_self: str | None = None
        match node:
            case ast.ClassDef(name=name):
                for statement in node.body:  # what is defined here may be an override
                    for made in _defined(statement):
                        if PRIVATE.fullmatch(made):
                            yield Touch(self.path, statement.lineno, made), name
                within = name
            case ast.Attribute(value=value, attr=attr, ctx=ctx):
                if PRIVATE.fullmatch(attr) and not self.standard(value):
                    names, of_self = [attr], within if _is_self(value) else None
                if isinstance(ctx, ast.Store | ast.Del) and not _is_self(value) and (counts_writing or self.imported(value)):
                    written = [attr]
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr" as does),
                          args=[owner, ast.Constant(value=str(attr)), *_]):
                written = [attr] if does in ("setattr", "delattr") and self.imported(owner) else []
                names = [attr] if PRIVATE.fullmatch(attr) and not _is_self(owner) else []
            case ast.Constant(value=str(text)):
                names = [text] if PRIVATE.fullmatch(text) and text in known else []
            case ast.Import():
                names = [part for alias in node.names for part in alias.name.split(".") if PRIVATE.fullmatch(part)]
            case ast.ImportFrom(module=str(module)):
                if not module.startswith(OURS):
                    parts = [*module.split("."), *(alias.name for alias in node.names)]
                    names = [part for part in parts if PRIVATE.fullmatch(part)]
        for name in names:
            yield Touch(self.path, line, name), of_self
        for name in written:
            if not name.startswith("__"):
                yield Touch(self.path, line, name, written=True), None
        for child in ast.iter_child_nodes(node):
            yield from self._walk(child, within, counts_writing, known)


@functools.cache
def _file(path: str, text: str) -> _File:
    return _File(path, ast.parse(text))


def _defined(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _is_self(node: ast.expr) -> bool:
    match node:
        case ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super")):
            return True
    return False


def _foreign_members(name: str, classes: Mapping[str, list[str]]) -> frozenset[str]:
    """The private names that a class of ours has from classes of other packages."""
    members: frozenset[str] = frozenset()
    for base in classes[name]:
        last = base.rpartition(".")[2]
        if last in classes and last != name:
            members |= _foreign_members(last, classes)
        elif base and base.partition(".")[0] not in (sys.stdlib_module_names | {OURS}) and "." in base:
            members |= members_of(resolve(base)) | PUT_ON.get(base, set())
    return members


def resolve(dotted: str) -> Any:
    """The object of that path."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        return functools.reduce(getattr, parts[end:], found)
    raise ImportError(dotted)


@functools.cache
def members_of(owner: Any) -> frozenset[str]:
    """Private names of an object: its attributes, and what its classes' sources read and write on ``self``."""
    names = set(dir(owner))
    for part in getattr(owner, "__mro__", ()):
        if part.__module__ not in sys.stdlib_module_names and part is not object:
            try:
                names |= set(re.findall(r"\bself\.(\w+)", inspect.getsource(part)))
            except (TypeError, OSError):  # written in C
                continue
    return frozenset(name for name in names if PRIVATE.fullmatch(name))


def is_there(owner: Any, name: str) -> bool:
    """Whether ``owner`` (a module, a class or a function) has or reads ``name``."""
    if hasattr(owner, name):
        return True
    parts = [part for part in getattr(owner, "__mro__", (owner,))
             if part is not object and getattr(part, "__module__", None) not in sys.stdlib_module_names]
    return any(re.search(rf"\b{re.escape(name)}\b", inspect.getsource(part)) for part in parts)
