"""What was changed on a model, so that `decompress()` leaves it exactly as it was."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_compress.engine import attention

_ABSENT = "hf_compress: not set on the instance"  # a value, so that copies and pickles compare equal


class UndoLog:
    """Hooks, taps, instance attributes, submodules and frozen parameters in the order in which they were set.

    Only bound methods and small objects are registered, never closures: copies and pickles of the model rebind them.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._taps: list[nn.Module] = []
        self._attributes: list[tuple[nn.Module, str, Any, Any]] = []
        self._children: list[tuple[nn.Module, str]] = []
        self._frozen: list[tuple[nn.Parameter, bool]] = []

    def pre_hook(self, module: nn.Module, hook: Any) -> None:
        """Forward pre-hook with keyword arguments."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def hook(self, module: nn.Module, hook: Any, *, first: bool = False, always: bool = False) -> None:
        """Forward hook with keyword arguments; `first` runs it before older ones, `always` also after an exception."""
        handle = module.register_forward_hook(hook, with_kwargs=True, prepend=first, always_call=always)
        self._handles.append(handle)

    def tap(self, module: nn.Module, sink: Any, key: Any) -> None:
        """Read the attention of a module."""
        attention.tap(module, sink, key)
        self._taps.append(module)

    def child(self, module: nn.Module, name: str, child: nn.Module) -> None:
        """A submodule under a name that is free."""
        module.add_module(name, child)
        self._children.append((module, name))

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """An instance attribute that hides the one of the class."""
        self._attributes.append((module, name, module.__dict__.get(name, _ABSENT), value))
        module.__dict__[name] = value

    def trains(self, parameter: nn.Parameter, wanted: bool) -> None:
        """Whether a parameter is trained."""
        self._frozen.append((parameter, parameter.requires_grad))
        parameter.requires_grad_(wanted)

    def undo(self) -> None:
        """Take everything back."""
        for handle in self._handles:
            handle.remove()
        for module in self._taps:
            attention.untap(module)
        for module, name, old, value in reversed(self._attributes):
            if module.__dict__.get(name) is not value:
                continue  # somebody has wrapped it since, and goes on calling it
            del module.__dict__[name]
            if old != _ABSENT:
                module.__dict__[name] = old
        for module, name in self._children:
            module._modules.pop(name, None)
        for parameter, wanted in reversed(self._frozen):
            parameter.requires_grad_(wanted)
        self._handles, self._taps, self._attributes, self._children, self._frozen = [], [], [], [], []
