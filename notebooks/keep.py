"""Runs the notebooks of this folder and keeps what they print and draw.

    python notebooks/keep.py            # all of them, some minutes
    python notebooks/keep.py 04 06      # those whose names begin so

Warnings and progress bars (whatever goes to standard error) are left out: they name folders of the machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
LIMIT = 600  # seconds a cell, on a busy machine
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run(path: Path, folder: Path) -> Any:
    """The notebook with its outputs, run from top to bottom in a kernel of this interpreter, at work in `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    kernel = folder / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "MPLBACKEND"},  # the kernel draws inline
        "PYTHONPATH": paths,
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "OMP_NUM_THREADS": "1",
    }
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = str(folder / "jupyter")  # where this process looks for the kernel
    try:
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(folder)}})
        asyncio.run(client.async_execute(env=environment))
    finally:
        os.environ.pop("JUPYTER_PATH") if before is None else os.environ.update(JUPYTER_PATH=before)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main(beginnings: list[str]) -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        if beginnings and not path.name.startswith(tuple(beginnings)):
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(run(path, Path(folder)), path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
