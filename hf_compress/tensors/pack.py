"""Low bits: asymmetric quantisation in groups, and codes packed into bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_compress.tensors.attention import at_once

BITS = (1, 2, 4, 8)


def quantize(
    x: Tensor, bits: int, group: int | tuple[int, int], scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of `bits` for groups of neighbouring numbers.

    step = (max - min) / (2^bits - 1), code = round((x - min) / step), half to even; a constant group takes step 1.

    Args:
        x: (..., n, d).
        group: (g, c): the numbers of g consecutive tokens and c consecutive channels share step and minimum; g divides
            n and c divides d. An integer c stands for (1, c).

    Returns:
        codes (..., n, d) uint8 below 2^bits; step and minimum (..., n / g, d / c) in `scale_dtype`, the numbers that
        codes were computed with.
    """
    size = group if isinstance(group, tuple) else (1, group)
    codes, step, low = pieces(lambda part: _quantize(part, bits, size, scale_dtype), x)
    return codes, step, low


def _quantize(x: Tensor, bits: int, group: tuple[int, int], scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    (g, c), (*batch, n, d) = group, x.shape
    blocks = x.float().reshape(*batch, n // g, g, d // c, c)
    low, high = blocks.amin((-3, -1), keepdim=True), blocks.amax((-3, -1), keepdim=True)
    low = low.to(scale_dtype).float()
    step = ((high - low) / (2**bits - 1)).to(scale_dtype).float()
    step = torch.where(step > 0, step, 1.0)
    codes = (blocks - low).div_(step).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes.view(x.shape), step[..., 0, :, 0].to(scale_dtype), low[..., 0, :, 0].to(scale_dtype)


def pieces(f: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """f, which treats the matrices of its arguments (..., n, d) one by one, on as many at once as stay in the caches.

    What does not fit there takes several times as long. The leading dimensions of all arguments and results are alike.
    """
    batch, each = tensors[0].shape[:-2], tensors[0].shape[-2:].numel()
    most = at_once(tensors[0].device, each)
    if batch.numel() <= most:
        return f(*tensors)
    parts = zip(*(t.flatten(0, -3).split(most) for t in tensors))
    return tuple(torch.cat(out).unflatten(0, batch) for out in zip(*(f(*part) for part in parts)))


def dequantize(codes: Tensor, step: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., n, d) numbers from what `quantize` gives."""
    *batch, n, d = codes.shape
    groups, channels = step.shape[-2:]
    blocks = codes.reshape(*batch, groups, n // max(groups, 1), channels, d // channels).float()
    step, low = (t.float()[..., :, None, :, None] for t in (step, low))
    return blocks.mul_(step).add_(low).view(codes.shape).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., n) codes to (..., n * bits / 8) bytes, the first code in the lowest bits; 8 / bits must divide n."""
    if bits == 8:
        return codes
    out = codes[..., :: 8 // bits].clone()
    for i in range(1, 8 // bits):
        out |= codes[..., i :: 8 // bits] << (i * bits)
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes that `pack` put together."""
    if bits == 8:
        return packed
    parts = (packed >> (i * bits) & (2**bits - 1) for i in range(8 // bits))
    return torch.stack(list(parts), -1).flatten(-2)


def bits_per_element(bits: int, group: int) -> float:
    """Stored bits per number, 16-bit step and minimum of its group included."""
    return bits + 32 / group


def divisor(d: int, most: int) -> int:
    """The largest divisor of d that is not larger than `most`."""
    return next(g for g in range(min(most, d), 0, -1) if d % g == 0)


def nearest_valid(x: Tensor, valid: Tensor) -> Tensor:
    """(..., n, d) with invalid tokens replaced by the nearest valid one before them, else after them.

    Padding would widen the range of its group. `valid` (..., n) bool is broadcast over heads.
    """
    at = torch.arange(x.shape[-2], device=x.device)
    last = torch.where(valid, at, -1).cummax(-1).values
    first = valid.to(torch.uint8).argmax(-1, keepdim=True)
    source = torch.where(last < 0, first, last).expand(x.shape[:-1])
    return x.gather(-2, source[..., None].expand_as(x))
