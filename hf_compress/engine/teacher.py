"""Distillation: the model without its compression, and without an adapter, says what the compressed one should say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.engine.context import Context
from hf_compress.engine.distill import Distill
from hf_compress.engine.state import IGNORED
from hf_compress.patches.versions import cache_of

NOT_OURS = ("labels", "num_items_in_batch", "return_dict", "use_cache")  # of the arguments: the teacher has its own


def lesson(context: Context, original: Callable[..., Any], inputs: dict[str, Any]) -> Tensor | None:
    """(n, V): what the teacher says before the n tokens with labels; None where nothing is to be learnt.

    One forward without gradient, in evaluation mode, with the weights that are there.

    Raises:
        ValueError: a training step has no labels, or a cache that holds tokens, which the compressed model has
            shortened.
    """
    labels = inputs.get("labels")
    if context.distill is None or not context.model.training or not torch.is_grad_enabled():
        return None
    if labels is None:
        raise ValueError(
            "labels=None: distill teaches the tokens that have labels; pass them (Trainer takes them out for "
            "label_smoothing_factor and compute_loss_func), or compress without distill"
        )
    if (cache := cache_of(inputs)) is not None and cache.get_seq_length():
        raise ValueError("distill: past_key_values holds tokens, which the teacher has not read; train without a cache")
    arguments = {name: value for name, value in inputs.items() if name not in NOT_OURS}
    with torch.no_grad(), context.state.scope() as state, _evaluating(context.model), _without_adapters(context.model):
        state.forward = state.run = None
        state.off = True
        return _before_labels(original(**arguments, use_cache=False, return_dict=True).logits, labels)


def divergence(knobs: Distill, out: Any, inputs: dict[str, Any], teacher: Tensor) -> Tensor:
    """What is added to the loss of `out`; see `Distill`.

    Args:
        teacher: (n, V), see `lesson`.

    Raises:
        ValueError: the model gives no logits for every row.
    """
    logits = out[1] if isinstance(out, tuple) else getattr(out, "logits", None)
    if not torch.is_tensor(logits) or logits.shape[:2] != inputs["labels"].shape:
        raise ValueError(
            "distill: the model gives no logits of all rows, as fused losses do (use_liger_kernel) and logits_to_keep; "
            "switch them off, or train without distill"
        )
    student = _before_labels(logits, inputs["labels"])
    said = F.log_softmax(student.float() / knobs.temperature, -1)
    right = F.log_softmax(teacher.to(said.device, torch.float32) / knobs.temperature, -1)
    total = F.kl_div(said, right, reduction="sum", log_target=True)
    items = inputs.get("num_items_in_batch")
    items = max(1, len(student)) if items is None else items.to(total.device) if torch.is_tensor(items) else items
    return knobs.weight * knobs.temperature**2 * total / items


def _before_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, L, V) to the rows (n, V) that predict a token with a label."""
    return logits[:, :-1][(labels[:, 1:] != IGNORED).to(logits.device)]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; every module is then in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Adapters of PEFT are off inside; what is trained stays as it was."""
    layers = [m for m in model.modules() if hasattr(m, "enable_adapters") and hasattr(m, "disable_adapters")]
    layers = [m for m in layers if m is not model and isinstance(m.disable_adapters, bool) and not m.disable_adapters]
    trained = [(p, p.requires_grad) for m in layers for p in m.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)
