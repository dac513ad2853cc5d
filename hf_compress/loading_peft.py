"""PEFT: the folder of an adapter says how its model is compressed, in a file beside the weights of the adapter."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_compress import hub
from hf_compress.config import CompressionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "compression_config.json"
_settled = ContextVar("_settled", default=False)  # whether a load is part of one that has restored the compression


# -- saving -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def beside_adapters(model: PreTrainedModel) -> Iterator[None]:
    """For the length of the block every adapter config of `model` that is saved has the compression beside it.

    What the methods train too: PEFT saves of it what `modules_to_save` names, and nothing else.
    """
    entry = None if model.compression is None else model.compression.config.to_dict()
    configs = list((getattr(model, "peft_config", None) or {}).values())
    for config in configs:
        config.save_pretrained = functools.partial(_save, model, config.save_pretrained, entry)
    try:
        yield
    finally:
        for config in configs:
            vars(config).pop("save_pretrained", None)


def _save(
    model: PreTrainedModel,
    original: Callable[..., None],
    entry: dict[str, Any] | None,
    folder: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    from hf_compress import weights

    original(folder, *args, **kwargs)
    file = Path(folder, FILE)
    Path(folder, weights.FILE).unlink(missing_ok=True)  # of an adapter that stood there before
    if trained := weights.trained(model):
        weights.write(trained, Path(folder, weights.FILE))
    if entry is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")


def saving(original: Any) -> Any:
    """Wraps `PeftModel.save_pretrained`."""

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_model()
        with beside_adapters(base) if hasattr(base, "compression") else contextlib.nullcontext():
            return original(self, *args, **kwargs)

    return save_pretrained


# -- loading ----------------------------------------------------------------------------------------------------------
def saved(folder: Any, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """What the folder (or the repository) of an adapter says of its compression, None if nothing."""
    if (found := hub.find(folder, FILE, arguments)) is None:
        return None
    try:
        return json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{found} is damaged: {error}") from error


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Adapters that are loaded in the block leave the compression to whoever loads the model."""
    inner = _settled.set(True)
    try:
        yield
    finally:
        _settled.reset(inner)


@contextlib.contextmanager
def restored(model: Any, folder: Any, wanted: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """The model is compressed as its adapter was saved, or as `wanted`; again as before if the block fails.

    Args:
        folder: of the adapter; wanted: `compression_config=` of the caller, None: as in the folder, False: leave it.

    Raises:
        ValueError: the model is compressed otherwise already. Nothing is changed then.
    """
    if _settled.get() or not hasattr(model, "compression") or folder is None:
        yield
        return
    from hf_compress.api import compress, decompress
    from hf_compress.engine.freezing import as_stored
    from hf_compress.weights import Weights

    entry = as_stored(saved(folder, arguments), model) if wanted is None else wanted
    config = CompressionConfig.from_dict(entry) if isinstance(entry, dict) else entry
    before = model.compression
    if config and before is not None and before.config.methods != config.methods:
        raise ValueError(
            f"the adapter in {os.fspath(folder)!r} goes with {getattr(config, 'summary', lambda: config)()}, but its "
            f"model is compressed by {before.config.summary()}; decompress() the model first, or load with "
            "compression_config=False to keep what it has"
        )
    if config and before is None:
        compress(model, config, weights=Weights(folder, arguments, required=wanted is None))
    elif wanted is None:
        _check_module(model, folder, arguments)
    try:
        with settled():
            yield
    except BaseException:
        if config and before is None:
            decompress(model)
        raise


def _check_module(model: Any, folder: Any, arguments: dict[str, Any]) -> None:
    """Raises ValueError if an adapter has trained what a method brings, and its model has nothing of the kind."""
    found = hub.find(folder, "adapter_config.json", arguments)
    names = (json.loads(found.read_text(encoding="utf-8")).get("modules_to_save") or ()) if found is not None else ()
    if "compressor" in names and not any(path.endswith("compressor") for path, _ in model.named_modules()):
        raise ValueError(
            f"the adapter in {os.fspath(folder)!r} holds a trained compressor, which PEFT would leave out: the model "
            "is not compressed by the method that it belongs to; compress(model, ...) first"
        )


def restoring(original: Any) -> classmethod[Any, Any, Any]:
    """Wraps `PeftModel.from_pretrained`; `compression_config=` as of `PreTrainedModel.from_pretrained`."""

    @functools.wraps(original)
    def from_pretrained(
        cls: type, model: Any, model_id: Any, *args: Any, compression_config: Any = None, **kwargs: Any
    ) -> Any:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with restored(base, model_id, compression_config, kwargs):
            return original(cls, model, model_id, *args, **kwargs)

    return classmethod(from_pretrained)


def adding(original: Any) -> Any:
    """Wraps `load_adapter` of PEFT and of transformers."""

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, compression_config: Any = None, **kwargs: Any) -> Any:
        base = self.get_base_model() if hasattr(self, "get_base_model") else self
        folder = args[0] if args else kwargs.get("model_id", kwargs.get("peft_model_id"))
        with restored(base, folder, compression_config, kwargs):
            return original(self, *args, **kwargs)

    return load_adapter
