"""Evicted entries of a KV cache that go into kept ones: pure functions over (B, H, n, d) tensors, head by head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.tensors.attention import at_once, excluded, heads_at_once
from hf_compress.tensors.ranking import largest

BLOCK = 256  # most sources that `nearest` compares at once


def take(x: Tensor, at: Tensor) -> Tensor:
    """(..., n, d) at the tokens (..., m): copies whole tokens, where `gather` copies numbers one by one.

    Of a tensor with room behind the n tokens of every head nothing but what is taken is copied.
    """
    (n, d), heads = x.shape[-2:], x.shape[:-2].numel()
    if _roomy(x):
        n, rows = x.stride(-3) // d, (heads - 1) * x.stride(-3) // d + n
        flat = x.as_strided((rows, d), (d, 1))
    else:
        flat = x.reshape(-1, d)
    first = n * torch.arange(heads, device=x.device).view(*x.shape[:-2], 1)
    return flat.index_select(0, (at + first).flatten()).view(*at.shape, d)


def _roomy(x: Tensor) -> bool:
    """Whether (..., n, d) are the first tokens of every head of a larger tensor: `reshape` would copy all of them."""
    if x.ndim < 3 or not x.numel() or x.is_contiguous() or x.requires_grad:
        return False
    size, step, d = x.shape, x.stride(), x.shape[-1]
    dense = all(step[i] == step[i + 1] * size[i + 1] for i in range(x.ndim - 3))
    return dense and step[-2:] == (d, 1) and step[-3] % d == 0


def leaving(slots: Tensor, real: Tensor | None, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The entries that do not stay.

    Args:
        slots: (B, H, n) that stay, each once per head; real: (B, H, n) bool, False on those that only fill up.
        candidates: (B, 1 or H, S) bool, entries that may be meant at all.

    Returns:
        (B, H, m) slots, ascending, m the largest number of any head; and (B, H, m) bool, False where a head has fewer.
    """
    stay = torch.ones_like(slots, dtype=torch.bool) if real is None else real
    gone = candidates.expand(-1, slots.shape[1], -1)
    gone = gone & ~torch.zeros_like(gone).scatter(2, slots, stay)
    at = gone.long().argsort(dim=-1, descending=True, stable=True)[..., : int(gone.sum(-1).max())]
    return at, gone.gather(-1, at)


def nearest(
    pairs: Sequence[tuple[Tensor, Tensor]], allowed: Callable[[slice], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The most similar target of every source; equal ones: the first.

    Args:
        pairs: sources (B, H, m, d) and targets (B, H, n, d), one pair (keys) or several (keys and values).
        allowed: block of sources -> (B or 1, 1 or H, 1 or sources, k) bool, which of the first k targets they may
            choose (of the others none); None: any.

    Returns:
        (B, H, m) fp32 similarity and (B, H, m) int64 target. The similarity is the cosine; of several pairs the
        product of theirs, and -1 where one is negative: two negative ones would make a false match. -inf where no
        target is allowed. Computed in blocks of sources, O(m n d) time.
    """
    units = [(F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)) for a, b in pairs]
    B, H, m, _ = pairs[0][0].shape
    n = pairs[0][1].shape[2]
    best = torch.empty(B, H, m, device=pairs[0][0].device)
    target = torch.zeros(B, H, m, dtype=torch.int64, device=best.device)
    rows = min(BLOCK, at_once(best.device, n, least=16))
    heads = heads_at_once(B, H, at_once(best.device, rows * n))
    for start in range(0, m, rows):
        part = slice(start, start + rows)
        may = None if allowed is None else allowed(part)
        k = n if may is None else may.shape[-1]
        if k == 0:
            best[:, :, part] = float("-inf")
            continue
        barred = None if may is None else excluded(may).expand(B, H, -1, -1)
        for b, h in heads:
            similarity = _similarity([(x[b, h, part], y[b, h, :k]) for x, y in units])
            if barred is not None:
                similarity.add_(barred[b, h])
            best[b, h, part], target[b, h, part] = largest(similarity)
    if len(units) > 1:
        best.masked_fill_((best < 0) & ~best.isneginf(), -1.0)
    return best, target


def _similarity(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(B, H, m, n) cosine of unit vectors, or the product of several, which is negative if one of them is."""
    similarity, *others = (a @ b.mT for a, b in pairs)
    if not others:
        return similarity
    product = math.prod(others, start=similarity)
    for cosine in (similarity, *others):  # never above either: negative as soon as one of them is
        product = torch.minimum(product, cosine, out=product)
    return product


def pour(x: Tensor, target: Tensor, weight: Tensor, n: int) -> Tensor:
    """(B, H, n, d) fp32: the weighted sum of the sources x (B, H, m, d) of each of n targets (weight (B, H, m))."""
    (B, H, _, d), source = x.shape, x.float() * weight[..., None]
    place = target + n * torch.arange(B * H, device=x.device).view(B, H, 1)
    out = source.new_zeros(B * H * n, d)  # flat: torch adds whole rows then
    return out.scatter_add_(0, place.view(-1, 1).expand(-1, d), source.view(-1, d)).view(B, H, n, d)


def rerotated(rotate: Callable[[Tensor], Tensor], slots: Tensor, keys: Tensor, prompt: Tensor) -> Tensor:
    """(B, H, n, d) keys before their rotation (fp32), rotated to the positions of their slots, like those of `prompt`.

    Args:
        rotate: rotates keys of all slots of the prompt.
        slots: (B, H, n), each once per head.
        prompt: (B, H, S, d), for its shape and precision.
    """
    at = slots[..., None].expand_as(keys)
    return rotate(torch.zeros_like(prompt, dtype=keys.dtype).scatter(2, at, keys)).gather(2, at).to(prompt.dtype)
