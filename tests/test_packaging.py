"""What `pip` installs: a wheel, a source archive, and a package that imports beside broken neighbours."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVE = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", ".*_cache", "__pycache__", ".hypothesis"
)
MODULES = {str(f.relative_to(ROOT)) for f in (ROOT / "hf_compress").rglob("*.py")} | {
    f"hf_compress/{f.relative_to(ROOT)}" for f in (ROOT / "patches").rglob("*.py")
}


def run(program, folder, **environment):
    """Output of a Python program, or of a module's command line, in a folder."""
    command = [sys.executable, *program] if isinstance(program, list) else [sys.executable, "-c", program]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind, source, folder):
    """The archive that the build system makes of a source tree, without fetching anything."""
    folder.mkdir()
    run(f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})", source)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source archive of this tree, unpacked."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=LEAVE)
    archive = build("sdist", folder / "tree", folder / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return source


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """The wheel that is built from it, as a package index gets it."""
    return zipfile.ZipFile(build("wheel", unpacked, tmp_path_factory.mktemp("wheel") / "out"))


def test_a_wheel_holds_every_module(wheel):
    """Those of new folders and of patches/ too, and the data beside them; and nothing else."""
    names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert {n for n in names if n.endswith(".py")} == {m for m in MODULES if "__pycache__" not in m}
    assert {"hf_compress/py.typed", "hf_compress/demo/llava/config.json"} <= names
    assert all(n.startswith("hf_compress/") for n in names)


def test_links_of_the_description_work_on_an_index(wheel):
    """Every relative link of the README is one into the repository, and what it names is there."""
    (name,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
    text = message_from_string(wheel.read(name).decode()).get_payload()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    own = [t for t in targets if t.startswith("https://github.com/hf-compress/")]
    assert all(t.startswith(("https://", "http://", "#")) for t in targets) and len(own) > 20
    for target in own:
        kind, branch, path = target.removeprefix("https://github.com/hf-compress/hf-compress/").split("/", 2)
        assert kind == ("raw" if path.endswith(".png") else "blob") and branch == "main"
        assert (ROOT / path.split("#")[0]).exists(), target


def test_tests_run_in_an_unpacked_source_archive(unpacked):
    files = {str(f.relative_to(ROOT)) for part in ("tests", "recipes", "notebooks", "benchmarks", "patches")
             for f in (ROOT / part).rglob("*") if f.is_file() and "__pycache__" not in f.parts}  # fmt: skip
    assert not {f for f in files if not (unpacked / f).exists()}
    some = ["tests/test_readme.py::test_links_point_to_files", "tests/test_api.py::test_functional_twins"]
    run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *some], unpacked)
    where = run("import hf_compress.patches.llava as m; print(m.__file__)", unpacked)
    assert Path(where.strip()).is_relative_to(unpacked)


@pytest.mark.parametrize("state", ["missing", "broken"])
def test_bitsandbytes_is_needed_by_nobody(state, tmp_path):
    """It is installed for those who quantize; a build of it that does not load is none of our business."""
    block = "import sys; sys.modules['bitsandbytes'] = None\n"
    if state == "broken":
        (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('no CUDA binary')\n")
        block = ""
    program = block + (
        "import sys, hf_compress, torch; from tests.tiny import build\n"
        "model = build('llama').compress('snapkv', ratio=0.5, window=4)\n"
        "model.generate(torch.arange(1, 20)[None], max_new_tokens=2); print(model.compression.last.cache_tokens)"
    )
    out = run(program, tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert "[9]" in out
