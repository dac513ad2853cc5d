"""`from_pretrained` that restores a compression, and takes one as an argument."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from hf_compress.api import compress
from hf_compress.config import CompressionConfig


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


def plain(original: Any) -> classmethod[Any, Any, Any]:
    """Wraps `AutoConfig.from_pretrained`, which takes over what config.json has: plain data, and never None."""

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("compression_config", None)
        if wanted is not None:
            kwargs["compression_config"] = wanted.to_dict() if isinstance(wanted, CompressionConfig) else wanted
        return original(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def attach() -> None:
    """Let `from_pretrained` know of compressions, once per process."""
    for cls, wrap in ((PreTrainedModel, restoring), (AutoConfig, plain)):
        method = cls.__dict__["from_pretrained"].__func__
        if method.__globals__ is not globals():
            cls.from_pretrained = wrap(method)
