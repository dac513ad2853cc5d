"""Draws that can be repeated: integers that look random and follow from other integers alone.

Everything is arithmetic modulo 2^64, so that the device and the order of a sum make no difference, and no generator is
read or advanced. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fingerprint", "key", "shuffled", "uniform"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per number


def _signed(number: int) -> int:
    """The same 64 bits as an int64."""
    return (number + 2**63) % 2**64 - 2**63


_STEP, *_FACTORS = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Tensor) -> Tensor:
    """One step of SplitMix64 (Steele, Lea & Flood 2014): int64 to int64, one to one, every bit depends on all."""
    x = x + _STEP
    for shift, factor in zip((30, 27), _FACTORS):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))


def key(first: Tensor, *others: Tensor | int) -> Tensor:
    """int64 of the shape that the arguments broadcast to: one number from several, another one in another order."""
    out = _mix(first)
    for other in others:
        out = _mix(out + (_signed(other) if isinstance(other, int) else other))
    return out


def fingerprint(x: Tensor, place: Tensor | None = None) -> Tensor:
    """(n, ...) numbers of any kind to (n,) int64: what the bits of each row sum up to, each weighed by its place.

    Zeros add nothing. `place` (n, ...) int64 are the places; None: one after the other, eight bytes at a time.
    """
    flat, size = x.detach().contiguous().flatten(1), x.element_size()
    if place is None and not flat.shape[1] * size % 8:
        bits = (flat.clone() if flat.storage_offset() * size % 8 else flat).view(torch.int64)
    else:
        bits = flat.view(_BITS[size]).long()
    at = torch.arange(bits.shape[1], device=x.device) if place is None else place.flatten(1)
    return _mix((bits * (_mix(at) | 1)).sum(1))


def uniform(keys: Tensor, count: int) -> Tensor:
    """(...) int64 keys to (..., count) fp32 in [0, 1): of each key its own numbers, in steps of 2^-24."""
    draws = key(keys[..., None], torch.arange(count, device=keys.device))
    return ((draws >> 40) & (2**24 - 1)).float() / 2**24


def shuffled(keys: Tensor, count: int) -> Tensor:
    """(...) int64 keys to (..., count) int64: of each key its own order of the numbers below `count`."""
    return key(keys[..., None], torch.arange(count, device=keys.device)).argsort(-1)
