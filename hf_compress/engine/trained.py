"""What methods train: modules of their own under the model, which optimisers and checkpoints find there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_compress.engine.reach import acting, enters
from hf_compress.engine.stage import Budgeted
from hf_compress.methods.base import TowerMethod, VisionMethod
from hf_compress.patches.base import AS_CONFIGURED, DEEPEST, Architecture
from hf_compress.tensors.ambient import own_precision

Module = Callable[[], nn.Module | None]  # looked up at every call
NAME = "compressor"  # of the model's attribute, and what the keys of its weights begin with
TRAINED = "was_trained"  # buffer of a module without which its method is of no use: whether a training step has seen it


class Compressor(nn.Module):
    """The modules of one compression, each under the name of its stage; `methods` says whose they are."""

    methods: dict[str, str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing calls it; the methods call their own modules."""
        raise NotImplementedError("a compressor is no layer; its modules are called by the methods of their stages")


@torch.inference_mode(False)
def build(
    model: nn.Module, adapter: Architecture, stages: dict[str, Budgeted], embedding: nn.Module
) -> Compressor | None:
    """The modules of all methods, on the device and in the precision of the embeddings; None: there are none.

    They are drawn from the seed of torch (`torch.manual_seed`), whatever was drawn before: equal on all processes. They
    can be trained, also where `compress` is called under `torch.inference_mode`.

    Raises:
        ValueError: a method gives something else than a module, or the model has an attribute of that name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        modules = {name: _module(model, adapter, stage.method) for name, stage in stages.items() if _wanted(stage)}
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
        if stages[name].method.needs_weights:
            module.register_buffer(TRAINED, torch.zeros((), dtype=torch.bool))
        out.add_module(name, module)
    device = weight.device
    if device.type == "meta":  # offloaded: its hook brings the weights to where they are needed
        device = torch.device(getattr(getattr(embedding, "_hf_hook", None), "execution_device", None) or "cpu")
    dtype = weight.dtype if weight.is_floating_point() else model.dtype
    return out.to(device=device, dtype=dtype).train(model.training)


def _wanted(stage: Budgeted) -> bool:
    """Whether what a method trains has anything to say."""
    return stage.open or not stage.method.counts_only


@own_precision  # whatever the default dtype: the same numbers are drawn
def _module(model: nn.Module, adapter: Architecture, method: Any) -> Any:
    """What a method trains where it acts."""
    if isinstance(method, TowerMethod) and enters(method, adapter, model):
        blocks = acting(method, adapter, model, AS_CONFIGURED)
        return method.tower_module(adapter.tower_blocks(model, DEEPEST)[0].norm.weight.shape[-1], len(blocks))
    if isinstance(method, VisionMethod) and type(method).tower_reader is not VisionMethod.tower_reader:
        seen = adapter.attention_blocks(model, AS_CONFIGURED)
        norms = [p for name, p in adapter.hidden_module(model, seen[-1]).named_parameters() if "norm" in name]
        return method.tower_reader(model, max(p.shape[-1] for p in norms), len(seen))  # those of heads are narrower
    return method.module(model)


def check_trained(model: nn.Module, stages: dict[str, Budgeted], known: set[str]) -> None:
    """A forward begins: in training it trains the modules, else they must have been trained.

    Args:
        known: takes the stages that were found trained, so that the device is asked once only.

    Raises:
        ValueError: a method that needs weights has new ones.
    """
    for name, stage in stages.items():
        if name in known or not stage.method.needs_weights or stage.ratio == 0:
            continue
        module = module_of(model, name)
        if module is None:
            continue
        if module.training and torch.is_grad_enabled():
            getattr(module, TRAINED).fill_(True)
        elif bool(getattr(module, TRAINED)):
            known.add(name)
        else:
            raise ValueError(
                f"method={stage.name!r}: its module is new, and what it would give means nothing; pass weights= of a "
                "folder that model.compression.save wrote, or train it first (model.train(); recipes/tiny_encoders)"
            )


def pass_as_trained(model: nn.Module) -> None:
    """Let new modules run: for who asks what they cost, not what they give."""
    for module in getattr(model, NAME, nn.Module()).children():
        if hasattr(module, TRAINED):
            getattr(module, TRAINED).fill_(True)


def untrained() -> None:
    """The module of a method that trains nothing."""


def module_of(model: nn.Module, stage: str) -> nn.Module | None:
    """The module of a stage as it is now: PEFT and others may have put another in its place."""
    return getattr(getattr(model, NAME, None), stage, None)
