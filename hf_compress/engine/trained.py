"""What methods train: modules of their own under the model, which optimisers and checkpoints find there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_compress.engine.stage import Budgeted

Module = Callable[[], nn.Module | None]  # looked up at every call
NAME = "compressor"  # of the model's attribute, and what the keys of its weights begin with


class Compressor(nn.Module):
    """The modules of one compression, each under the name of its stage; `methods` says whose they are."""

    methods: dict[str, str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing calls it; the methods call their own modules."""
        raise NotImplementedError("a compressor is no layer; its modules are called by the methods of their stages")


def build(model: nn.Module, stages: dict[str, Budgeted], embedding: nn.Module) -> Compressor | None:
    """The modules of all methods, on the device and in the precision of the embeddings; None: there are none.

    Raises:
        ValueError: a method gives something else than a module, or the model has an attribute of that name.
    """
    modules = {name: stage.method.module(model) for name, stage in stages.items()}
    found = {name: module for name, module in modules.items() if module is not None}
    if not found:
        return None
    for name, module in found.items():
        if not isinstance(module, nn.Module):
            raise ValueError(f"method={stages[name].name!r}: module() gave a {type(module).__name__}, no nn.Module")
    if hasattr(model, NAME):
        raise ValueError(
            f"model={type(model).__name__} has an attribute {NAME!r} of its own, where modules would stand"
        )
    out, weight = Compressor(), embedding.weight
    out.methods = {name: stages[name].name for name in found}
    for name, module in found.items():
        out.add_module(name, module)
    device = weight.device
    if device.type == "meta":  # offloaded: its hook brings the weights to where they are needed
        device = torch.device(getattr(getattr(embedding, "_hf_hook", None), "execution_device", None) or "cpu")
    dtype = weight.dtype if weight.is_floating_point() else model.dtype
    return out.to(device=device, dtype=dtype).train(model.training)


def untrained() -> None:
    """The module of a method that trains nothing."""


def module_of(model: nn.Module, stage: str) -> nn.Module | None:
    """The module of a stage as it is now: PEFT and others may have put another in its place."""
    return getattr(getattr(model, NAME, None), stage, None)
