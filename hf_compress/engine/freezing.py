"""Which parts of a compressed model are trained."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from hf_compress import registry
from hf_compress.engine.trained import NAME
from hf_compress.engine.undo import UndoLog
from hf_compress.patches.base import Architecture

COMPRESSOR, PROJECTOR, ALL = TRAINABLE = ("compressor", "compressor+projector", "all")


def check_trainable(trainable: str | None, model: nn.Module, adapter: Architecture, compressor: bool) -> None:
    """Raises ValueError where `trainable` is none of `TRAINABLE`, or names what is not there or cannot be trained.

    Args:
        compressor: whether the methods train a module.
    """
    if trainable is None:
        return
    kind = type(model).__name__
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable={trainable!r} must be one of {TRAINABLE}, or None: everything as it is")
    if trainable == COMPRESSOR and not compressor:
        able = [spec.name for spec in registry.methods().values() if spec.trains]
        raise ValueError(f"trainable={trainable!r}: the methods train no module; these do: {able}")
    if trainable == PROJECTOR and adapter.tower(model) is None:
        raise ValueError(f"trainable={trainable!r}: {kind} has no projector; take {COMPRESSOR!r} or {ALL!r}")
    wanted = model if trainable == ALL else adapter.projector(model) if trainable == PROJECTOR else nn.Module()
    for name, parameter in wanted.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"trainable={trainable!r}: {name} of {kind} is stored in {parameter.dtype} (4 or 8 bits), which cannot "
                "be trained; leave it out of the quantization (llm_int8_skip_modules=... of BitsAndBytesConfig), or "
                "train LoRA on it and give trainable=None"
            )


def freeze(trainable: str | None, model: nn.Module, adapter: Architecture, log: UndoLog) -> None:
    """Train the parts that `trainable` names, and freeze all others, adapters of PEFT included."""
    if trainable is None:
        return
    parts = [model] if trainable == ALL else [part] if (part := getattr(model, NAME, None)) is not None else []
    if trainable == PROJECTOR:
        parts.append(adapter.projector(model))
    wanted = {id(parameter) for part in parts for parameter in part.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad != (id(parameter) in wanted):
            log.trains(parameter, id(parameter) in wanted)


def as_stored(saved: Any, model: nn.Module) -> Any:
    """What a checkpoint says of its compression, less that parts are trained which are stored in 4 or 8 bits now."""
    asked = saved.get("trainable") if isinstance(saved, dict) else None
    if asked in (None, COMPRESSOR) or not getattr(model, "is_quantized", False):
        return saved
    warnings.warn(
        f"the checkpoint was trained with trainable={asked!r}; {type(model).__name__} is loaded in 4 or 8 bits, which "
        "cannot be trained, so that this is left out; LoRA can be trained on it",
        stacklevel=5,
    )
    return {name: value for name, value in saved.items() if name != "trainable"}
