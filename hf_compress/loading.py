"""`from_pretrained` that restores a compression, and takes one as an argument."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from hf_compress.api import compress


def restoring(original: Any) -> classmethod[Any, Any, Any]:
    """Wraps `PreTrainedModel.from_pretrained`.

    A checkpoint saved while compressed carries `compression_config` in its config.json; the loaded model is compressed
    alike. `from_pretrained(name, compression_config={"methods": [...]})` compresses any checkpoint, and
    `compression_config=False` loads a saved one uncompressed.
    """

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, compression_config: Any = None, **kwargs: Any) -> Any:
        out = original(cls, *args, **kwargs)
        model = out[0] if isinstance(out, tuple) else out
        saved = model.config.__dict__.pop("compression_config", None)
        wanted = saved if compression_config is None else compression_config
        if wanted:
            compress(model, wanted)
        return out

    return classmethod(from_pretrained)


def attach() -> None:
    """Let `from_pretrained` know of compressions, once per process."""
    method = PreTrainedModel.__dict__["from_pretrained"].__func__
    if not hasattr(method, "__wrapped__") or method.__module__ != __name__:
        PreTrainedModel.from_pretrained = restoring(method)
