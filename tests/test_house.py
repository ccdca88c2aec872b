"""The house keeps its order: rooms that can be read at once, no import circle, and imports that point down.

Imports inside functions and under TYPE_CHECKING count as well: a reader has to follow them just the same.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import sppo

PACKAGE = Path(sppo.__file__).parent
LINES, FUNCTION = 400, 60


def sources() -> dict[str, tuple[str, ast.Module, bool]]:
    """Every module by name: its text, its tree, whether it is a package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        *folders, name = path.relative_to(PACKAGE.parent).with_suffix("").parts
        package = name == "__init__"
        text = path.read_text()
        found[".".join(folders if package else [*folders, name])] = text, ast.parse(text), package
    return found


SOURCES = sources()


def imports(module: str) -> set[str]:
    """The modules of this package that a module names in any of its imports."""
    _, tree, package = SOURCES[module]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            here = parts[: len(parts) - node.level + package] if node.level else []
            base = ".".join([*here, *([node.module] if node.module else [])])
            found |= {name if (name := f"{base}.{alias.name}") in SOURCES else base for alias in node.names}
    return (found & SOURCES.keys()) - {module}


def listed(findings: Iterable[str]) -> str:
    return "\n" + "\n".join(sorted(findings))


def layers() -> dict[str, int]:
    """Each layer of pyproject.toml by its depth, the top one 0."""
    contracts = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return {layer: depth for depth, layer in enumerate(next(c["layers"] for c in contracts if c["type"] == "layers"))}


def layer_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_no_module_is_longer_than_400_lines() -> None:
    long = {module: n for module, (text, _, _) in SOURCES.items() if (n := text.count("\n")) > LINES}
    assert not long, listed(f"{name}: {n} lines" for name, n in long.items())


def test_no_function_is_longer_than_60_lines() -> None:
    long = {
        f"{module}.{node.name}": lines
        for module, (_, tree, _) in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION
    }
    assert not long, listed(f"{name}: {n} lines" for name, n in long.items())


def test_no_imports_go_round_in_a_circle() -> None:
    circle: list[str] = []
    try:
        TopologicalSorter({module: imports(module) for module in SOURCES}).prepare()
    except CycleError as error:
        circle = error.args[1]
    assert not circle, " imported by ".join(circle)


def test_imports_point_down_the_layers() -> None:
    depth = layers()
    upward = [
        f"{module} -> {target}"
        for module in SOURCES
        for target in sorted(imports(module))
        if {layer_of(module), layer_of(target)} <= depth.keys() and depth[layer_of(target)] < depth[layer_of(module)]
    ]
    assert not upward, listed(upward)


def test_every_module_belongs_to_a_layer() -> None:
    lost = {layer_of(module) for module in SOURCES} - {*layers(), "sppo", "sppo.__main__"}
    assert not lost, listed(lost)
