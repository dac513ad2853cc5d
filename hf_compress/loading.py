"""How a compression travels with a checkpoint: `save_pretrained` writes it, `from_pretrained` restores or takes one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_compress import loading_peft
from hf_compress.config import CompressionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENTRY = "compression_config"  # in config.json


@contextlib.contextmanager
def written(model: PreTrainedModel) -> Iterator[None]:
    """The config of a model has what its config.json shall say of the compression, for the length of the block.

    A config may belong to several models, and may come from the file of a compressed one.
    """
    entries, compression = vars(model.config), model.compression
    before = {ENTRY: entries.pop(ENTRY)} if ENTRY in entries else {}
    if compression is not None:
        entries[ENTRY] = compression.config.to_dict()
    try:
        yield
    finally:
        entries.pop(ENTRY, None)
        entries.update(before)


def saving(original: Any) -> Any:
    """Wraps `PreTrainedModel.save_pretrained`: config.json says how the model is compressed, or nothing."""

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with written(self), loading_peft.beside_adapters(self):
            return original(self, *args, **kwargs)

    return save_pretrained


def restoring(original: Any) -> classmethod[Any, Any, Any]:
    """Wraps `PreTrainedModel.from_pretrained`.

    A checkpoint saved while compressed carries `compression_config` in its config.json; the loaded model is compressed
    alike. `from_pretrained(name, compression_config={"methods": [...]})` compresses any checkpoint, and
    `compression_config=False` loads a saved one uncompressed.
    """

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, compression_config: Any = None, **kwargs: Any) -> Any:
        with loading_peft.settled():
            out = original(cls, *args, **kwargs)
        model = out[0] if isinstance(out, tuple) else out
        saved = vars(model.config).pop(ENTRY, None)
        if compression_config is None and getattr(model, "_hf_peft_config_loaded", False):
            name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            of_adapter = kwargs.get("adapter_kwargs") or {}
            saved = loading_peft.saved(of_adapter.get("_adapter_model_path", name), {**kwargs, **of_adapter}) or saved
        wanted = saved if compression_config is None else compression_config
        if wanted:
            from hf_compress.api import compress

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
