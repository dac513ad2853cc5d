"""Numbers that stand for what images show and prompts say, for methods that draw.

A sample draws the same whatever it is batched and padded with, in whatever order and process; towers round by the
batch, so that pixels and token ids are counted, not what was made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_compress.patches.base import Architecture
from hf_compress.tensors.draw import fingerprint, key
from hf_compress.tensors.select import spaced

if TYPE_CHECKING:
    from hf_compress.engine.encoded import Encoded

SIGNS = 48  # of ready-made features: enough to tell images apart, few enough that rounding hardly ever turns one


def of_images(adapter: Architecture, model: nn.Module, encoded: Encoded) -> Tensor:
    """(images,) int64: one number per image, from all its crops."""
    if encoded.content is None:
        device = encoded.images[0].device
        parts = torch.tensor([(u.image, u.crop) for u in encoded.units], device=device)
        if encoded.call is None:
            seen = torch.stack([_signs(encoded.images[u.image][u.rows]) for u in encoded.units])
        else:
            crops = adapter.pixels(model, encoded.call)
            each = fingerprint(crops) if isinstance(crops, Tensor) else torch.cat([fingerprint(c[None]) for c in crops])
            seen = each.to(device)[parts[:, 1]]
        numbered = key(seen, torch.tensor(numbers(encoded), device=device))
        encoded.content = key(numbered.new_zeros(len(encoded.images)).index_add(0, parts[:, 0], numbered))
    return encoded.content


def numbers(encoded: Encoded) -> list[int]:
    """Of every unit, how many units of its image come before it."""
    before: dict[int, int] = {}
    out = []
    for unit in encoded.units:
        out.append(before.get(unit.image, 0))
        before[unit.image] = out[-1] + 1
    return out


def of_rows(what: Tensor, real: Tensor | None) -> Tensor:
    """(B,) int64 of the ids (B, q), or the embeddings (B, q, D), of prompts in their order; `real` False: padding."""
    if what.ndim == 3:
        what = fingerprint(what.flatten(0, 1)).view(what.shape[:2])
    if real is None:
        return fingerprint(what.long() + 1)
    return fingerprint((what.long() + 1) * real, real.long().cumsum(1) - 1)


def with_images(content: Tensor, images: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """The content (B,) of prompts and that of their images (n,), of which row b shows `rows[b]` in this order."""
    shown = [(b, k, i) for b, mine in enumerate(rows) for k, i in enumerate(mine)]
    row, number, image = torch.tensor(shown, device=content.device).view(-1, 3).unbind(1)
    return key(content.index_add(0, row, key(images.to(content.device)[image], number)))


def _signs(x: Tensor) -> Tensor:
    """Of the features (N, D) of a crop that was encoded elsewhere: in which channels its first half is the larger."""
    half = len(x) // 2
    more = (x[:half].float().mean(0) - x[half:].float().mean(0))[spaced(x.shape[1], min(SIGNS, x.shape[1]))]
    return fingerprint((more > 0)[None])[0]
