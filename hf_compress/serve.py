"""The serving of transformers, an endpoint of the OpenAI type, with a compressed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_compress.config import CompressionConfig
from hf_compress.loading import ENTRY

CONFIG = "config.json"


def check_installed() -> None:
    """Raises ValueError where what the server needs is not there."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError("the server of transformers is not installed; pip install 'hf-compress[serve]'")


def server(folder: Path, **options: Any) -> Any:
    """The server of transformers for a checkpoint whose compression is restored; it runs until it is stopped.

    Args:
        folder: of the checkpoint, such as `dressed` makes; options: of `transformers.cli.serve.Serve`.

    Raises:
        ValueError: what the server needs is not installed, or the method cannot act on the model.
    """
    check_installed()
    from transformers.cli.serve import Serve

    return Serve(force_model=str(folder), **options)


def place_of(model: str) -> Path:
    """The folder of a checkpoint; one on a hub is fetched.

    Raises:
        ValueError: there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if model.startswith("demo:"):
        from hf_compress import demo

        name = model.removeprefix("demo:")
        if name not in demo.MODELS:
            raise ValueError(f"model={model!r}: there are {', '.join(f'demo:{known}' for known in demo.MODELS)}")
        return Path(demo.__file__).parent / demo.MODELS[name]
    if Path(model).is_dir():
        return Path(model).resolve()
    try:
        return Path(snapshot_download(model))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"model={model!r} is no folder, and not within reach on a hub ({error})") from error


def dressed(checkpoint: Path, new: Path, config: CompressionConfig | None) -> Path:
    """A folder that shows a checkpoint with another compression in its config.json; all other files are links.

    Args:
        checkpoint: a folder that `save_pretrained` wrote; new: the folder to make.
        config: of the compression; None: without one.

    Raises:
        ValueError: there is no config.json in it.
    """
    if not (checkpoint / CONFIG).is_file():
        raise ValueError(f"{str(checkpoint)!r} holds no {CONFIG}; name a folder that save_pretrained wrote")
    new.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.name != CONFIG:
            (new / file.name).symlink_to(file.resolve())
    found = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    found.pop(ENTRY, None)
    if config is not None:
        found[ENTRY] = config.to_dict()
    (new / CONFIG).write_text(json.dumps(found, indent=2), encoding="utf-8")
    return new
