"""Fused kernels, where there are any for what is stored; what they replace stays the reference and the default.

Decoding one token over a cache in a few bits would unpack the whole layer at every step, and over heads of different
lengths go through them one by one. On a CUDA device (compute capability 8.0 or more) with Triton a kernel reads what is
stored instead, if

- the layer holds `Packed` keys and values (kivi, and store="kivi8" ... "kivi1" of evicting methods), whose groups have
  powers of two as sizes, and heads of one length of up to 256 channels (`decode`),
- or heads of different lengths end to end, as they are (heads="adaptive", kvzip, ems; not razor, whose means carry a
  weight), of up to 256 channels of 16 bits or 128 of 32 (`segments`),
- attention is "sdpa", so that no soft cap and no learned sink enters it,
- one token is fed, and no gradient is asked for (there is no backward).

Where it stands (one H100, bf16, 32 query and 8 KV heads of 128, benchmarks/kernel.py): attention over 4 bits takes 0.77
to 0.96 of the time over the uncompressed cache from 16k entries on (1.06 at 4k for one sequence), and 0.03 to 0.08 of
unpacking. A whole decode step of one sequence, eight layers, takes 1.09 times the bare model's at 4k and 0.91 at 64k:
Python and launches are most of its time. Heads of different lengths: a step of two layers as wide as a 7B model takes
1.4 times a bare one with as many entries, at batch 1 and 8; one by one they took 5 and 26 times as long.

Everything else is unpacked and goes to the model's own attention: other stores (mixed bits, low rank, outliers),
several tokens at once.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_compress.layout import Layout

MOST = 256  # channels of a head


@functools.lru_cache
def available() -> bool:
    """Whether a device of this process can run them."""
    if not torch.cuda.is_available() or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return any(torch.cuda.get_device_capability(i) >= (8, 0) for i in range(torch.cuda.device_count()))


@functools.lru_cache
def usable(device: torch.device) -> bool:
    """Whether this device can."""
    return available() and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def reads(body: tuple[Any, Any], new: Tensor) -> bool:
    """Whether `attend` reads this body for the `new` keys (B, Hkv, q, d) that were just appended."""
    from hf_compress.stores.ragged import Ragged

    if new.shape[2] != 1 or torch.is_grad_enabled() or not usable(new.device):
        return False
    if isinstance(body[0], Ragged):
        most = MOST if new.dtype.itemsize == 2 else MOST // 2  # what shared memory holds
        return body[0].lead is None and max(part.flat.shape[1] for part in body) <= most
    return fits(*(getattr(part, "packed", None) for part in body))


def fits(keys: Any, values: Any) -> bool:
    """Whether these are packed in a form that the kernel reads."""
    from hf_compress.stores.packed import Packed

    if type(keys) is not Packed or type(values) is not Packed or not len(keys) or len(keys) != len(values):
        return False
    tokens = {part.group[0] for part in (keys, values)} - {1}
    sizes = [part.codes.shape[-1] * 8 // part.bits for part in (keys, values)]
    groups = [n for part in (keys, values) for n in part.group]
    return len(tokens) <= 1 and max(sizes) <= MOST and all(n & (n - 1) == 0 for n in groups)


def attend(query: Tensor, scaling: float, body: tuple[Any, Any], tail: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
    """(B, 1, Hq, d') attention of one token per row, queries (B, Hq, 1, d), over a body that `reads` accepts."""
    from hf_compress.kernels import decode, segments
    from hf_compress.layout import HeadLayout
    from hf_compress.stores.ragged import Ragged

    if isinstance(body[0], Ragged):
        assert isinstance(layout, HeadLayout)
        newest = layout.newest(tail[0].shape[2])
        return segments.attend(query, scaling, *body, tail, None if newest.all_valid else newest.valid)
    valid = None
    if not layout.all_valid:
        valid = layout.valid if layout.valid.ndim == 3 else layout.valid[:, None]
    return decode.attend(query, scaling, body[0].packed, body[1].packed, tail, valid)
