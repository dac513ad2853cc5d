"""Every notebook runs from top to bottom, in a kernel of this interpreter, and is committed with what it shows."""

import ast
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONG = 4000  # characters of text below a cell


@pytest.fixture(scope="module")
def keep():
    spec = importlib.util.spec_from_file_location("keep", ROOT / "notebooks" / "keep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cells_that_end_in_a_compression_print_nothing_long(tmp_path, keep):
    """A line of what it is, nothing of its end."""
    cells = [
        "import hf_compress\nmodel, _ = hf_compress.load_demo('recall')",
        "model.compress('knorm', ratio=0.5)\nmodel.compression",
        "model.decompress()",
        "model.compress('knorm', ratio=0.5)\nhf_compress.decompress(model)",
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells))), tmp_path / "in.ipynb")
    found = outputs(keep.run(tmp_path / "in.ipynb", tmp_path))
    (line,) = [out["data"]["text/plain"] for out in found]
    assert line == "LlamaForCausalLM compressed by knorm(ratio=0.5)"


def snippets(path):
    """What a reader takes over from a page or a notebook, as cells."""
    if path.suffix == ".ipynb":
        return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=lambda path: path.stem)
def test_no_cell_ends_in_a_model(path):
    """`compress` returns it, as `eval` and `to` do, to be chained: below a cell it would print all of its modules."""
    for snippet in snippets(path):
        last = ast.parse(TransformerManager().transform_cell(snippet)).body[-1]
        call = last.value.func if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) else None
        assert getattr(call, "attr", None) not in ("compress", "eval", "to", "train"), ast.unparse(last)


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
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
