"""Every notebook runs from top to bottom, in a kernel of this interpreter, and is committed with what it shows."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONG = 4000  # characters of text below a cell


@pytest.fixture(scope="module")
def keep():
    spec = importlib.util.spec_from_file_location("keep", ROOT / "notebooks" / "keep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook):
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def texts(notebook):
    for out in outputs(notebook):
        yield str(out.get("text") or out.get("data", {}).get("text/plain", ""))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_its_outputs(path):
    """All cells in order, figures included; no warnings, no folders of a machine, and nothing long."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    assert any("image/png" in out.get("data", {}) for out in outputs(notebook))
    assert not [out for out in outputs(notebook) if out.output_type == "error" or out.get("name") == "stderr"]
    for text in texts(notebook):
        assert not re.search(r"/(?:home|root|tmp|work|usr|Users)/", text) and len(text) < LONG, text[:200]


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.name[:2] >= "03"], ids=lambda path: path.stem)
def test_a_notebook_says_what_it_is_for(path):
    """What the reader will be able to do, and which line to change for a checkpoint of his own."""
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.startswith("# ") and "At the end you will" in cells[0].source
    assert "08" in path.name or sum("<- YOUR CHECKPOINT" in cell.source for cell in cells) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, keep):
    found = outputs(keep.run(path, tmp_path))
    assert any("image/png" in out.get("data", {}) for out in found)
    assert not [out for out in found if out.output_type == "error"]
