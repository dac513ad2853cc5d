"""How a compression travels with a checkpoint: `save_pretrained` writes it, `from_pretrained` restores or takes one."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_compress import card, loading_peft
from hf_compress.config import CompressionConfig
from hf_compress.registry import STAGES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENTRY = "compression_config"  # in config.json
KEYS = rf"^compressor\.({'|'.join(STAGES)})\."  # of what methods train, in the weights of a checkpoint


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
    """Wraps `PreTrainedModel.save_pretrained`: config.json says how the model is compressed, or nothing.

    What was measured for that lies beside the checkpoint, and goes along.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with written(self), loading_peft.beside_adapters(self):
            out = original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        if self.compression is not None and given.get("is_main_process", True):
            from hf_compress.calibrate.files import carry

            carry(self, given["save_directory"])
        return out

    return save_pretrained


def uploading(original: Any) -> Any:
    """Wraps what `push_to_hub` does with the folder that it has written: the model card tells of the compression."""

    @functools.wraps(original)
    def _upload_modified_files(self: PreTrainedModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if self.compression is not None:
            card.write(working_dir, self.compression.card())
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files


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
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        adapter = None
        if getattr(model, "_hf_peft_config_loaded", False):
            of_adapter = kwargs.get("adapter_kwargs") or {}
            adapter, arguments = of_adapter.get("_adapter_model_path", name), {**kwargs, **of_adapter}
            beside, name = loading_peft.saved(adapter, arguments), model.config._name_or_path
            saved = beside or saved
            adapter = adapter if beside else None
        wanted = saved if compression_config is None else compression_config
        if wanted:
            from hf_compress.api import compress
            from hf_compress.engine.freezing import as_stored
            from hf_compress.weights import OfCheckpoint, Weights

            required = compression_config is None
            wanted = as_stored(saved, model) if required else wanted
            weights = Weights(adapter, arguments, required) if adapter else OfCheckpoint(name, kwargs, required)
            compress(model, wanted, weights=weights)
        return out

    return classmethod(from_pretrained)


def knowing(original: Any) -> Any:
    """Wraps `PreTrainedModel.post_init`: weights that methods trained are none that a checkpoint has by mistake."""

    @functools.wraps(original)
    def post_init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), KEYS}

    return post_init


def plain(original: Any) -> classmethod[Any, Any, Any]:
    """Wraps `AutoConfig.from_pretrained`, which takes over what config.json has: plain data, and never None."""

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("compression_config", None)
        if wanted is not None:
            kwargs["compression_config"] = wanted.to_dict() if isinstance(wanted, CompressionConfig) else wanted
        return original(cls, *args, **kwargs)

    return classmethod(from_pretrained)
