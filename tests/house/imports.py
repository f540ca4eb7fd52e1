"""Own the walk over the imports of the package: which module imports which, wherever the statement stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
PACKAGE = "pagefold"


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted((SOURCE / PACKAGE).rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    """Return a module's syntax tree."""
    return ast.parse(modules()[module].read_text())


def imported(module: str) -> Iterator[str]:
    """Yield the dotted names a module imports, at its top or inside functions; a name from a package as its own module if it is one."""
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                whole = f"{base}.{name.name}"
                yield whole if whole in modules() else base


def inside(module: str) -> set[str]:
    """Return the modules of the package that a module imports; the packages around one are not counted."""
    return {name for name in imported(module) if name.split(".")[0] == PACKAGE and name != module}


def outside(module: str) -> set[str]:
    """Return the top-level names of everything else a module imports."""
    return {name.split(".")[0] for name in imported(module)} - {PACKAGE}


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Return one cycle of a graph, first node repeated at the end; empty if there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for following in sorted(edges.get(node, ())):
            if found := visit(following):
                return found
        path.pop()
        done.add(node)
        return []

    for start in sorted(edges):
        if found := visit(start):
            return found
    return []
