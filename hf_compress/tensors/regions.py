"""The crops of an image as regions of a view of the whole image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Box = tuple[float, float, float, float]  # top, left, bottom, right as fractions of the sides of an image


def cells(n: int, start: float, stop: float) -> slice:
    """Those of n cells along one side whose centres lie between two fractions of it."""
    return slice(*(round(n * at) for at in (start, stop)))


def centres(grids: Sequence[tuple[int, int]], boxes: Sequence[Box]) -> Tensor:
    """(N, 2) fp32: where the tokens of crops that lie in `boxes` have their middles, as fractions of the image."""
    out = []
    for (h, w), (top, left, bottom, right) in zip(grids, boxes):
        rows = top + (torch.arange(h) + 0.5) / h * (bottom - top)
        out.append(torch.cartesian_prod(rows, left + (torch.arange(w) + 0.5) / w * (right - left)))
    return torch.cat(out)


def region_sums(view: Tensor, boxes: Sequence[Box]) -> Tensor:
    """(n, h, w) to (n, P): the sum over the cells whose centres lie in each of P boxes."""
    h, w = view.shape[1:]
    parts = [view[:, cells(h, top, bottom), cells(w, left, right)] for top, left, bottom, right in boxes]
    return torch.stack([part.sum((1, 2)) for part in parts], 1)


def beside_whole(sizes: Sequence[int], keep: int) -> int:
    """What the crops of an image keep of a budget if the whole image in small, the first of the `sizes`, stays.

    Raises:
        ValueError: the budget is below its tokens.
    """
    if keep < (whole := sizes[0]):
        total = sum(sizes)
        raise ValueError(
            f"keep={keep} of {total} tokens: the whole image in small has {whole}, which are never cut; keep at least "
            f"as many (ratio at most {1 - whole / total:.4g})"
        )
    return keep - whole


def nearest_tokens(old: tuple[int, int], new: tuple[int, int], device: torch.device) -> Tensor:
    """(h*w,) int64: for every token of the grid `old` the token of the grid `new` that covers its centre."""

    def axis(n: int, m: int) -> Tensor:
        return ((torch.arange(n, device=device) * 2 + 1) * m) // (2 * n)

    return (axis(old[0], new[0])[:, None] * new[1] + axis(old[1], new[1])[None]).flatten()
