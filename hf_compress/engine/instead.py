"""Attributes of a compressed model that stand before methods of its class."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import nn

from hf_compress.engine.context import Context


class Instead:
    """Instance attribute that is called in place of a method of its `owner`; `original` is that method.

    Without the compression it only passes on: others may have wrapped it, and keep it.
    """

    def __init__(self, context: Context, name: str):
        self.context, self.__name__ = context, name
        self.inner = self.owner.__dict__.get(name)  # a wrapper that somebody set on the instance

    @property
    def owner(self) -> nn.Module:
        """The module whose attribute it is."""
        return self.context.model

    @property
    def original(self) -> Any:
        """What is called without the compression."""
        owner = self.owner
        return getattr(type(owner), self.__name__).__get__(owner) if self.inner is None else self.inner

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)  # computed, not stored: signatures cannot be pickled

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.owner:
            args = args[1:]
            self._unwrap()
        return (self.call if self.context.installed else self.original)(*args, **kwargs)

    def _unwrap(self) -> None:
        """Accelerate has taken its wrappers off, as far as it saw them, and bound what was left like a function."""
        found = inspect.unwrap(self.inner) if self.inner is not None else None
        self.inner = MethodType(found, self.owner) if inspect.isfunction(found) else found

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What is called with it."""
        raise NotImplementedError

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call by name, those of `**kwargs` among them."""
        return {**dict(zip(self.__signature__.parameters, args)), **kwargs} if args else dict(kwargs)
