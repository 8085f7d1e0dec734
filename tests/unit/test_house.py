"""The house stands as CONTRIBUTING.md draws it: which package may import which, and what stays free of torch.

Everything here is read from the import statements themselves, those inside functions included.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

import lbr_dist

PACKAGE = Path(lbr_dist.__file__).parent
ROOT = PACKAGE.parent

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "sentence_transformers", "peft", "matplotlib", "numpy"}
"""What takes a second or more to import, or brings in something that does."""

NO_TORCH = ("config", "console", "errors", "slurm", "status", "storage")
"""Packages that a login node imports, whole: not one of their modules imports what is heavy."""

KNOW_DEEPSPEED = {"engine", "model.sharding", "launch.doctor.stack"}
COLLECTIVES = re.compile(r"all_|broadcast|barrier|reduce|gather|scatter|send|recv|irecv|isend")
HOLD_COLLECTIVES = {"ranks.group", "contrastive.exchange", "launch.doctor.stack"}


@dataclass
class Module:
    """What a module imports, by dotted name; names inside the package are without its own."""

    path: Path
    docstring: str
    at_import: set[str] = field(default_factory=set)
    """Imported when the module is."""

    later: set[str] = field(default_factory=set)
    """Imported inside functions, or for types alone."""

    collectives: list[str] = field(default_factory=list)

    @property
    def all(self) -> set[str]:
        return self.at_import | self.later


@cache
def modules() -> dict[str, Module]:
    """Every module of the package, by its name without `lbr_dist.`; a package is its `__init__`."""
    paths = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for top in (PACKAGE, *(PACKAGE / name for name in ("kernels", "launch", "slurm")))
        for path in top.rglob("*.py")
    }
    paths.pop("__init__")
    return {name: _read(name, path, set(paths)) for name, path in paths.items()}


def _read(name: str, path: Path, known: set[str]) -> Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = Module(path, ast.get_docstring(tree) or "")

    def walk(node: ast.AST, later: bool) -> None:
        for child in ast.iter_child_nodes(node):
            found = module.later if later else module.at_import
            if isinstance(child, ast.Import):
                found.update(_inside(alias.name, known) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: a relative import"
                source = child.module or ""
                found.update(_inside(f"{source}.{alias.name}", known, source) for alias in child.names)
            elif isinstance(child, ast.Call) and ast.unparse(child.func).startswith("dist."):
                called = ast.unparse(child.func).removeprefix("dist.")
                module.collectives += [called] if COLLECTIVES.match(called) else []
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            walk(child, later or inside or types_only)

    walk(tree, later=False)
    module.at_import.discard(name)
    return module


def _inside(dotted: str, known: set[str], source: str = "") -> str:
    """A module of the package without its prefix; of anything else, the dotted name of the module."""
    if not dotted.startswith("lbr_dist"):
        return source or dotted
    short = dotted.removeprefix("lbr_dist").lstrip(".")
    return short if short in known else source.removeprefix("lbr_dist").lstrip(".")


def _room(name: str) -> str:
    return name.split(".")[0]


@cache
def floors() -> dict[str, int]:
    """The floor of every package and top-level module, from the table in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    found = [(room, int(floor)) for floor, rooms in rows for room in re.findall(r"`([a-z_]+)(?:/|\.py)`", rooms)]
    assert len(found) == len(dict(found)), "a room stands on two floors"
    return dict(found)


def test_every_room_has_a_floor() -> None:
    assert set(floors()) == {_room(name) for name in modules()}


def test_imports_only_go_down() -> None:
    wrong = [
        f"{name} (floor {floors()[_room(name)]}) imports {other} (floor {floors()[_room(other)]})"
        for name, module in modules().items()
        for other in module.all & set(modules())
        if _room(other) != _room(name) and floors()[_room(other)] >= floors()[_room(name)]
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(modules()[name].all & set(modules())):
                visit(other, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


# ---- no torch ------------------------------------------------------------------------------------------------------


def _imported_with(name: str) -> Iterator[tuple[str, ...]]:
    """Every chain of imports that importing a module sets off, down to what is not ours."""
    seen: set[str] = set()
    waiting: list[tuple[str, ...]] = [(name,)]
    while waiting:
        chain = waiting.pop()
        parts = chain[-1].split(".")
        parents = {".".join(parts[:i]) for i in range(1, len(parts))} & set(modules())
        for other in sorted(modules()[chain[-1]].at_import | parents):
            if other in modules() and other not in seen:
                seen.add(other)
                waiting.append((*chain, other))
            elif other not in modules():
                yield (*chain, other)


def _promises_no_torch() -> list[str]:
    said = {name for name, module in modules().items() if "imports no torch" in module.docstring.lower()}
    return sorted(said | {name for name in modules() if _room(name) in NO_TORCH})


@pytest.mark.parametrize("name", _promises_no_torch())
def test_a_module_that_promises_it_imports_no_torch(name: str) -> None:
    # numpy alone is quick, and reads vectors and token ids
    heavy = HEAVY - {"numpy"} if _room(name) not in NO_TORCH else HEAVY
    chains = [" -> ".join(chain) for chain in _imported_with(name) if chain[-1].split(".")[0] in heavy]
    assert not chains


# ---- who knows what ------------------------------------------------------------------------------------------------


def test_two_files_know_deepspeed() -> None:
    knowing = {name for name, module in modules().items() if any("deepspeed" in other for other in module.all)}
    assert knowing == KNOW_DEEPSPEED


def test_collectives_are_called_where_they_are_counted() -> None:
    calling = {name: module.collectives for name, module in modules().items() if module.collectives}
    assert set(calling) == HOLD_COLLECTIVES, calling


def test_unit_tests_mirror_the_library() -> None:
    tests = ROOT / "tests" / "unit"
    folders = {path.relative_to(tests) for path in tests.rglob("*") if path.is_dir() and path.name != "__pycache__"}
    assert not [str(folder) for folder in folders if not (PACKAGE / folder).is_dir()]
