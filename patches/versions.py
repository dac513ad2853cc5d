"""What differs between releases of transformers, read from the installed one wherever it can be read."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn

TESTED = ("5.23", "5.24")  # the releases that the whole test suite runs on
CACHE = ("cache", "past_key_values")  # what the KV cache is called since 5.24 (until 5.40 by both names), and before
# Since 5.24 a layer in training mode is checkpointed only while gradients are recorded.
CHECKPOINTS_WITHOUT_GRADIENT = transformers.__version__.startswith("5.23.")


def parameters(module: nn.Module) -> list[str]:
    """Names of the arguments that the forward of a module takes, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def require(module: nn.Module, *names: str) -> None:
    """Raises RuntimeError where the forward of a module lacks one of the arguments `names`, or takes no KV cache."""
    cache_name(module)
    if lacking := sorted(set(names) - set(parameters(module))):
        raise RuntimeError(f"{type(module).__name__}.forward does not take {lacking}{remedy()}")


def cache_name(module: nn.Module) -> str:
    """What the forward of a module calls its KV cache.

    Raises:
        RuntimeError: it takes none by any name that is known.
    """
    taken = parameters(module)
    if name := next((n for n in CACHE if n in taken), None):
        return name
    raise RuntimeError(f"{type(module).__name__}.forward takes no KV cache under any of the names {CACHE}{remedy()}")


def cache_of(named: Any) -> Any:
    """The KV cache among named arguments or outputs, by whichever name; None if there is none."""
    return next((named[n] for n in CACHE if n in named and named[n] is not None), None)


def renamed(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments in which the KV cache goes by `name`.

    Raises:
        ValueError: it was given twice, under both names.
    """
    other = next(n for n in CACHE if n != name)
    if other not in kwargs:
        return kwargs
    if kwargs.get(name) is not None and kwargs[other] is not None:
        raise ValueError(f"{name} and {other} are one argument; give {name} only")
    out = dict(kwargs)
    given = out.pop(other)
    return out if out.get(name) is not None else {**out, name: given}


def checkpoints(decoder: nn.Module) -> bool:
    """Whether layers are run again in backward, so that they fill no cache."""
    asked = decoder.training and bool(getattr(decoder, "gradient_checkpointing", False))
    return asked and (CHECKPOINTS_WITHOUT_GRADIENT or torch.is_grad_enabled())


def remedy() -> str:
    """The end of a message about a transformers that behaves otherwise than expected."""
    return (
        f"; transformers {transformers.__version__} is installed and {' and '.join(f'{v}.*' for v in TESTED)} are "
        "tested: install one of these, or a newer hf-compress"
    )
