"""Finds the files beside a user's module that it imports, by reading its source: nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def local_sources(path: Path, *, root: Path) -> list[Path]:
    """Return a source file and all files below `root` that it imports, directly or through others, sorted.

    Imports inside functions count too. What is not found below `root` belongs to an installed package.

    Args:
        path: A Python file.
        root: The folder that its absolute imports start from.
    """
    found = {path}
    waiting = [path]
    while waiting:
        for imported in _imports(waiting.pop(), root):
            if imported not in found:
                found.add(imported)
                waiting.append(imported)
    return sorted(found)


def _imports(path: Path, root: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return  # it cannot have been imported either; whoever imports it tells the user
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(root, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            start = path.parents[node.level - 1] if node.level else root
            parts = node.module.split(".") if node.module else []
            yield from _files(start, parts)
            for alias in node.names:
                yield from _files(start, [*parts, alias.name])


def _files(start: Path, parts: list[str]) -> Iterator[Path]:
    """Yield the files that importing a dotted name runs: the packages on the way, and the module."""
    folder = start
    for part in parts:
        module, package = folder / f"{part}.py", folder / part / "__init__.py"
        if package.is_file():
            yield package
        elif module.is_file():
            yield module
        folder = folder / part
