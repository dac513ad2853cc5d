"""Devices that a machine does not have: tensors in memory that claim to live elsewhere, and operations that check it.

    with pretend():
        model(**{key: on(value, "cuda:0") for key, value in batch.items()})   # after place(model, ...)

An operation on tensors of two devices raises, as it would on real ones. Scalars and CPU indices are welcome everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")


class Elsewhere(torch.Tensor):
    """A tensor with a device of its own choice."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return self.__dict__.get("claimed", CPU)


def on(x: Any, device: torch.device | str) -> Any:
    """The same tensor as if on `device`; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    out = x if isinstance(x, Elsewhere) else x.as_subclass(Elsewhere)
    out.claimed = torch.device(device)
    return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor)]


class pretend(TorchFunctionMode):
    """Within it operations respect the claims."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in ("__get__", "__set__"):  # attributes such as .mT and .data
            return on(func(*args, **kwargs), args[0].device)
        if name in ("to", "type_as"):
            return self._to(func, args, kwargs)
        wanted = kwargs.get("device")
        if wanted is not None:
            wanted, kwargs["device"] = torch.device(wanted), CPU
        given = _tensors((args, kwargs))
        found = {t.device for t in given if t.ndim} or {t.device for t in given}
        if len(found) > 1:
            found = {self._one(name, args, given, found)}
        out, known = func(*args, **kwargs), {id(t) for t in given}
        device = wanted or next(iter(found), CPU)
        return tree_map(lambda t: t if id(t) in known else on(t, device), out)

    def _to(self, func: Any, args: Any, kwargs: Any) -> Any:
        values = [*args[1:], *kwargs.values()]
        target = [v.device if isinstance(v, torch.Tensor) else v for v in values]
        target = [torch.device(d) for d in target if isinstance(d, (torch.device, str))]
        here = lambda v: CPU if isinstance(v, (torch.device, str)) else v
        out = func(*tree_map(here, args), **tree_map(here, kwargs))
        if not target or target[0] == args[0].device:
            return on(out, args[0].device)
        return on(out.view_as(out) if out is args[0] else out, target[0])

    def _one(self, name: str, args: Any, given: list[torch.Tensor], found: set[torch.device]) -> torch.device:
        """The device of the result of an operation that may mix devices.

        Raises:
            RuntimeError: it may not.
        """
        if name == "copy_":
            return args[0].device
        if name == "__setitem__" and not _tensors(args[1]):  # slices are copied to
            return args[0].device
        indexes = name in ("__getitem__", "__setitem__", "index_put")
        if indexes and all(t.device in (args[0].device, CPU) for t in given if t.ndim):
            return args[0].device
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {sorted(map(str, found))}")


def place(model: torch.nn.Module, where: Callable[[str], str]) -> torch.nn.Module:
    """Spread a model over devices as accelerate does: parameters move, every forward brings its arguments along."""

    def bring(forward: Any, device: str) -> Any:
        @functools.wraps(forward)
        def moved(*args: Any, **kwargs: Any) -> Any:
            fetch = lambda t: t.to(torch.device(device)) if isinstance(t, torch.Tensor) else t
            return forward(*tree_map(fetch, args), **tree_map(fetch, kwargs))

        return moved

    for name, module in model.named_modules():
        device = where(name)
        for held in (module._parameters, module._buffers):
            held.update({k: on(t.detach().clone(), device) for k, t in held.items() if t is not None})
        if name:
            module.forward = bring(module.forward, device)
    return model
