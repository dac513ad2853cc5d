"""Which adapter serves which model; adding an architecture is one file with one `Architecture` subclass."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import hf_compress.patches as folder
from hf_compress.patches.base import Architecture


def architectures() -> dict[str, Architecture]:
    """All adapters by `config.model_type`, sorted."""
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
    found = {t: cls() for cls in Architecture.__subclasses__() for t in cls.model_types}
    return dict(sorted(found.items()))


def adapter_for(model: Any) -> Architecture:
    """The adapter of a model.

    Raises:
        ValueError: there is none; the message lists what is supported.
    """
    known = architectures()
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in known:
        raise ValueError(
            f"model={type(model).__name__} (model_type={kind!r}) is not supported yet; supported are {', '.join(known)}"
        )
    return known[kind]
