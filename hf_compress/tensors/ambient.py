"""Autocast and the default dtype are meant for the model: our own arithmetic takes no notice of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

DEVICES = ("cpu", "cuda", "xpu", "mps")  # where there can be an autocast


def own_precision(function: Callable[P, T]) -> Callable[P, T]:
    """`function` in the dtypes that it names itself: without autocast, and with float32 where it names none.

    Not for functions that run modules of the model, whose dtypes may fit together under autocast only.
    """

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        default, casts = torch.get_default_dtype(), [kind for kind in DEVICES if torch.is_autocast_enabled(kind)]
        if default == torch.float32 and not casts:
            return function(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for kind in casts:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(torch.float32)
            return function(*args, **kwargs)

    return inner
