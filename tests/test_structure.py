"""How the package hangs together: folders import each other in one direction, annotations included."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

import hf_compress

ROOT = Path(hf_compress.__file__).parent


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere: at the top, for annotations, inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hf_compress"):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("hf_compress.")}
    return found


def graph() -> dict[str, set[str]]:
    paths = [Path(folder, name) for folder, _, names in os.walk(ROOT, followlinks=True) for name in names]
    files = {
        ".".join(("hf_compress", *p.relative_to(ROOT).with_suffix("").parts)): p for p in paths if p.suffix == ".py"
    }
    names = {name.removesuffix(".__init__"): path for name, path in files.items()}
    return {name: imports(path) & names.keys() - {name} for name, path in names.items()}


def circle(edges: dict[str, set[str]], among: set[str]) -> list[str]:
    """A way back to where it started, through the modules `among`; [] if there is none."""
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges[name] & among):
            if found := walk(other, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(among) if (found := walk(name, []))), [])


@pytest.mark.parametrize("folder", ["engine", "stores", "tensors", "signals", "patches", "evaluate", "bench", "show"])
def test_no_module_of_a_folder_needs_itself(folder):
    edges = graph()
    among = {name for name in edges if name.startswith(f"hf_compress.{folder}.")}
    assert len(among) > 2 and circle(edges, among) == []


def test_a_circle_would_be_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}, {"a", "b", "c"}) == ["b", "c", "b"]
