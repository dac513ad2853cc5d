"""Which adapter serves which model; adding an architecture is one file with one `Architecture` subclass."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import hf_compress.patches as folder
from hf_compress.patches.base import Architecture
from hf_compress.patches.unsupported import reason


def architectures() -> dict[str, Architecture]:
    """All adapters by `config.model_type`, sorted."""
    _import_all()
    found = {t: cls() for cls in _subclasses(Architecture) for t in vars(cls).get("model_types", ())}
    return dict(sorted(found.items()))


@functools.cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")


def _subclasses(cls: type[Architecture]) -> Iterator[type[Architecture]]:
    """Those of subclasses too: families share adapters."""
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def adapter_for(model: Any) -> Architecture:
    """The adapter of a model.

    Raises:
        ValueError: there is none; the message says why, or lists what is supported.
    """
    known, config = architectures(), getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    why = None if kind in known else reason(config)
    if why is not None:
        raise ValueError(f"model={type(model).__name__} (model_type={kind!r}) cannot be compressed: {why}")
    if kind not in known:
        raise ValueError(
            f"model={type(model).__name__} (model_type={kind!r}) is not supported yet; supported are {', '.join(known)}"
        )
    known[kind].check(model)
    return known[kind]
