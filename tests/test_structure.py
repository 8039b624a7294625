"""The house: imports go one way between rooms, there are no circles, and no part is too big."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    ["errors", "fields", "files", "locks", "seeds", "signals", "provenance", "table", "drawing", "version"],
    ["config", "geometry", "ranks"],
    ["kernels"],
    ["ops"],
    ["partition", "distributed"],
    ["activations"],
    ["train"],
    ["run"],
    ["evaluate"],
    ["adapters"],
    ["report"],
    ["cli", "__main__"],
]
"""Rooms from the ground up: a module imports its own floor's rooms and those below."""

FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def _modules() -> dict[str, Path]:
    """Dotted name under ``ndm_fast`` -> file."""
    found = {}
    for folder, prefix in ((ROOT / "ndm_fast", ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if prefix == () and parts[0] == "kernels":  # a link, in some checkouts
                continue
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(module: str, *, lazy: bool) -> Iterator[str]:
    """Modules of the package that a module imports; ``lazy`` counts imports inside functions too."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if lazy else _at_import(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = ["ndm_fast", *package.split(".")]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "ndm_fast":
                continue
            target = name.removeprefix("ndm_fast").lstrip(".")
            while target and target not in MODULES:
                target = target.rpartition(".")[0]
            if target and target != module:
                yield target


def _at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs when the module is imported."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def _room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_floor() -> None:
    assert sorted({_room(m) for m in MODULES if m}) == sorted(FLOOR_OF)


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_imports_go_down(module: str) -> None:
    """Imports inside functions too; only the package's ``__init__`` may name everything."""
    here = FLOOR_OF[_room(module)]
    upward = [t for t in _imports(module, lazy=True) if FLOOR_OF[_room(t)] > here]
    assert not upward, f"{module} imports {upward}, which lie above it"


def test_no_circles() -> None:
    graph = {m: sorted(set(_imports(m, lazy=False))) for m in MODULES if m}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_kernels_import_nothing_by_the_package_name() -> None:
    """So that the folder can be taken out as a package of its own."""
    for module, path in MODULES.items():
        if _room(module) == "kernels":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not [n for n in names if n and n.split(".")[0] == "ndm_fast"], f"{path}: {names}"


def test_rooms_of_the_top_two_levels() -> None:
    top = [p for p in (ROOT / "ndm_fast").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    assert len([p for p in top if p.name not in ("__init__.py", "__main__.py")]) + 1 <= 30  # and kernels


LONGEST_MODULE, LONGEST_FUNCTION, LONGEST_TRAINER = 300, 60, 200
LONGEST_KERNEL_MODULE, LONGEST_KERNEL = 400, 150

TOO_LONG: dict[str, int] = {}
"""What is longer than that, and how long it may be: the list only shrinks."""


def _sizes() -> dict[str, tuple[int, int]]:
    """Module, or module:function -> its lines, and how many it may have."""
    found = {}
    for module, path in MODULES.items():
        kernel = _room(module) == "kernels"
        text = path.read_text(encoding="utf-8")
        found[module] = len(text.splitlines()), LONGEST_KERNEL_MODULE if kernel else LONGEST_MODULE
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                found[f"{module}:{node.name}"] = lines, LONGEST_KERNEL if kernel else LONGEST_FUNCTION
            elif isinstance(node, ast.ClassDef) and node.name == "Trainer":
                lines = (node.end_lineno or 0) - node.lineno + 1
                found[f"{module}:{node.name}"] = lines, LONGEST_TRAINER
    return found


def test_nothing_is_too_long() -> None:
    assert "train.trainer:Trainer" in _sizes()
    grown = {n: lines for n, (lines, most) in _sizes().items() if lines > TOO_LONG.get(n, most)}
    assert not grown, "split these"
    shrunk = [n for n in TOO_LONG if n not in _sizes() or _sizes()[n][0] <= _sizes()[n][1]]
    assert not shrunk, "delete their entries in TOO_LONG"
