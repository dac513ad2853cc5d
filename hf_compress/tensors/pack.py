"""Low bits: asymmetric quantisation in groups, and codes packed into bytes."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (1, 2, 4, 8)


def quantize(x: Tensor, bits: int, group: int, scale_dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    """Codes of `bits` for groups of consecutive numbers of the last dimension.

    step = (max - min) / (2^bits - 1), code = round((x - min) / step); a constant group takes step 1.

    Args:
        x: (..., n) with n a multiple of `group`.

    Returns:
        codes (..., n) uint8 below 2^bits; step and minimum (..., n / group) in `scale_dtype`, the numbers that codes
        were computed with.
    """
    grouped = x.float().unflatten(-1, (-1, group))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    low = low.to(scale_dtype).float()
    step = ((high - low) / (2**bits - 1)).to(scale_dtype).float()
    step = torch.where(step > 0, step, 1.0)
    codes = ((grouped - low) / step).round().clamp(0, 2**bits - 1)
    return codes.flatten(-2).to(torch.uint8), step.squeeze(-1).to(scale_dtype), low.squeeze(-1).to(scale_dtype)


def dequantize(codes: Tensor, step: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., n) numbers from what `quantize` gives."""
    grouped = codes.unflatten(-1, (step.shape[-1], -1)).to(torch.float32)
    return torch.addcmul(low[..., None].float(), grouped, step[..., None].float()).flatten(-2).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., n) codes to (..., n * bits / 8) bytes, the first code in the lowest bits."""
    if bits == 8:
        return codes
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)
    return (codes.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes that `pack` put together."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def bits_per_element(bits: int, group: int) -> float:
    """Stored bits per number, 16-bit step and minimum of its group included."""
    return bits + 32 / group
