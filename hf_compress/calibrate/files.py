"""Where measurements lie, and whether they are of the model at hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from hf_compress.engine.undo import UndoLog
from hf_compress.patches.base import DEEPEST
from hf_compress.patches.registry import adapter_for
from hf_compress.saving import read_json, replaced, write_json

VERSION = 1
Identity = Callable[[nn.Module], dict[str, Any]]
RETRIEVAL, SEMANTIC, MERGING = "retrieval_heads.json", "semantic_heads.json", "merge_thresholds.json"
NAMES = (RETRIEVAL, SEMANTIC, MERGING)


class Decoder:
    """The decoder of a model as measurements see it.

    Attributes:
        layers: all of its layers; full: those that see the whole prompt (the others are bounded already).
        heads, kv_heads: query heads and KV heads per layer.
    """

    def __init__(self, model: nn.Module):
        self.adapter = adapter_for(model)
        if "cache" not in self.adapter.stages:
            raise ValueError(f"{type(model).__name__}: its cache cannot be compressed, so there is nothing to measure")
        self.module = self.adapter.decoder(model)
        self.config = self.module.config
        self.layers = list(self.adapter.layers(self.module))
        self.full = [i for i in range(len(self.layers)) if self.adapter.window(self.module, i) is None]
        if not self.full:
            raise ValueError(
                f"{type(model).__name__}: every layer keeps a sliding window already, so there is nothing to compress"
            )
        self.heads: int = self.config.num_attention_heads
        self.kv_heads: int = getattr(self.config, "num_key_value_heads", None) or self.heads

    def identity(self) -> dict[str, Any]:
        """What a file must agree with."""
        kind = self.config.model_type
        return {"model_type": kind, "layers": len(self.layers), "heads": self.heads, "kv_heads": self.kv_heads}


def decoder_identity(model: nn.Module) -> dict[str, Any]:
    """What a file about the layers of a language model must agree with."""
    return Decoder(model).identity()


def tower_identity(model: nn.Module) -> dict[str, Any]:
    """What a file about the blocks of a vision tower must agree with."""
    adapter = adapter_for(model)
    kind, width = model.config.model_type, getattr(model.config.vision_config, "hidden_size", None)
    return {"model_type": kind, "blocks": len(adapter.tower_blocks(model, DEEPEST)), "width": width}


@contextmanager
def reading(model: nn.Module) -> Iterator[UndoLog]:
    """A log for taps and hooks on a bare model, undone at the end.

    Raises:
        ValueError: the model is compressed.
    """
    if getattr(model, "compression", None) is not None:
        raise ValueError("model is compressed; measure the bare model: call model.decompress() first")
    log = UndoLog()
    try:
        yield log
    finally:
        log.undo()


def place(model: nn.Module, name: str, path: str | os.PathLike[str] | None, *, knob: str = "heads_file") -> Path:
    """`path`, or the file `name` in the folder that the model was loaded from.

    Raises:
        ValueError: `path` is none, or there is none and the model was not loaded from a folder.
    """
    if path is not None:
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"path={path!r} must be the path of a file, or None")
        return Path(path)
    folder = getattr(model, "name_or_path", "")
    if not folder or not os.path.isdir(folder):
        raise ValueError(
            f"path=None: {type(model).__name__} was not loaded from a local folder (name_or_path={folder!r}); say "
            f"where to write, path='.../{name}', and pass the same as {knob}= to compress()"
        )
    return Path(folder) / name


def save(model: nn.Module, file: Path, data: dict[str, Any], identity: Identity = decoder_identity) -> dict[str, Any]:
    """Write `data` with the identity of the model; returns what was written."""
    data = {"version": VERSION, "model": identity(model), **data}
    write_json(file, data)
    return data


def load(
    model: nn.Module,
    name: str,
    path: str | os.PathLike[str] | None,
    identity: Identity = decoder_identity,
    *,
    knob: str = "heads_file",
) -> dict[str, Any] | None:
    """What `save` wrote to `path`, or to `name` beside the checkpoint; None if there is no such file beside it.

    `knob`: what the path was passed as, for messages.

    Raises:
        ValueError: `path` is no file, or the file is damaged, or of another model or version.
    """
    folder = getattr(model, "name_or_path", "")
    if path is None and not (folder and os.path.isfile(os.path.join(folder, name))):
        return None
    file = Path(folder) / name if path is None else Path(path)
    if not file.is_file():
        wrong = f"is a folder; name a file, such as {name!r} in it" if file.is_dir() else "does not exist"
        raise ValueError(f"{knob}={os.fspath(file)!r} {wrong}")
    data, own = read_json(file, f"measure again, or give another {knob}="), identity(model)
    if data.get("version") != VERSION or data.get("model") != own:
        raise ValueError(
            f"{file}: measured on {data.get('model')} (version {data.get('version')}), but this model is {own} "
            f"(version {VERSION}); measure again"
        )
    return data


def carry(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Copy measurements from beside the checkpoint of a model to where its weights have just been saved."""
    for name in NAMES:
        old, new = Path(getattr(model, "name_or_path", "") or folder, name), Path(folder, name)
        if old.is_file() and old.resolve() != new.resolve():
            with replaced(new) as file:
                file.write_bytes(old.read_bytes())
