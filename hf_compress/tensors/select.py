"""Which tokens stay: pure functions from scores or counts to ascending token indices.

Nothing here waits for the device (but `best_slots` for its counts, if they are there), and equal scores are broken
the same way everywhere: the lower index wins.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "adaptive",
    "best_slots",
    "identity",
    "protect",
    "row_counts",
    "spaced",
    "spaced_grid",
    "suppressed",
    "top_by_part",
    "top_mask",
    "top_sorted",
    "worst_slot",
]

CHUNK = 2**24  # most similarities held at once (64 MiB)
CERTAIN = 1e37  # scores from here on are protections: those of a method, and +inf above them


def identity(n: int, tokens: int, device: torch.device | str | None = None) -> Tensor:
    """(n, tokens): every token of n images."""
    return torch.arange(tokens, device=device).repeat(n, 1)


@torch.no_grad()
def top_sorted(score: Tensor, k: int) -> Tensor:
    """(n, N) scores to the (n, k) ascending indices of the k highest of each row; ties: the lower index."""
    return score.argsort(dim=-1, descending=True, stable=True)[:, :k].sort(dim=-1).values


@torch.no_grad()
def top_mask(score: Tensor, k: int) -> Tensor:
    """(n, N) bool: the k highest of each row; ties: the lower index."""
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, top_sorted(score, k), True)


@torch.no_grad()
def top_by_part(score: Tensor, part: Tensor, counts: Tensor) -> Tensor:
    """(n, N) bool: of every part the highest scores; ties: the lower index.

    Args:
        score: (n, N); part: (n, N) int64, the part of each token; counts: (n, P) int64, how many of each part.
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, part.gather(1, order).argsort(dim=1, stable=True))  # part by part, the best ones first
    part = part.gather(1, order)
    size = torch.zeros_like(counts).scatter_add_(1, part, torch.ones_like(part))
    rank = torch.arange(part.shape[1], device=part.device) - (size.cumsum(1) - size).gather(1, part)
    return torch.zeros_like(part, dtype=torch.bool).scatter_(1, order, rank < counts.gather(1, part))


def spaced(n: int, k: int) -> list[int]:
    """k evenly spaced integers of range(n): `floor((i + 1/2) * n / k)`, distinct for k <= n."""
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def row_counts(h: int, w: int, k: int) -> list[int]:
    """How many of k cells, 0 <= k <= h * w, stand in each of the rows that they form on an (h, w) grid.

    There are about sqrt(k * h / w) rows, at most k, of k // rows cells each; the rest of the division goes to rows
    picked by the rule of `spaced`.
    """
    rows = min(max(round(math.sqrt(k * h / w)), 1), h, k)
    while k > rows * w:
        rows += 1
    if not rows:
        return []
    each, extra = divmod(k, rows)
    favoured = set(spaced(rows, extra))
    return [each + (i in favoured) for i in range(rows)]


def spaced_grid(h: int, w: int, k: int) -> list[int]:
    """k evenly spaced cells of an (h, w) grid as ascending raster indices, in rows by `row_counts`; both by the rule
    of `spaced`."""
    counts = row_counts(h, w, k)
    return [r * w + c for r, n in zip(spaced(h, len(counts)), counts) for c in spaced(w, n)]


@torch.no_grad()
def suppressed(x: Tensor, score: Tensor, group: Tensor, threshold: Tensor) -> Tensor:
    """(n, N) bool: tokens that resemble a better one of their group that is not suppressed itself.

    Asked in the order of falling scores; ties: the lower index. fp32, cost O(n * N^2 * D), in chunks of rows, and N
    small steps one after the other.

    Args:
        x: (n, N, D); score: (n, N); group: (n, N) int64; threshold: (n,), what resembles has a cosine above it.
    """
    n, N, D = x.shape
    order = score.argsort(dim=1, descending=True, stable=True)
    x = F.normalize(x.float(), dim=-1).gather(1, order[..., None].expand(-1, -1, D))
    group, out = group.gather(1, order), torch.zeros(n, N, dtype=torch.bool, device=x.device)
    rows = max(1, CHUNK // (n * N))
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        like = (x[:, part] @ x.mT > threshold[:, None, None]) & (group[:, part, None] == group[:, None])
        like = like.triu(start + 1)  # of all that come behind it
        for i in range(like.shape[1]):
            out |= like[:, i] & ~out[:, start + i, None]
    return torch.empty_like(out).scatter_(1, order, out)


@torch.no_grad()
def adaptive(score: Tensor, valid: Tensor, budget: Tensor, floor: float) -> Tensor:
    """How many entries each head keeps when the heads of a layer share its budget by one ranking (arXiv:2407.11550).

    Every head is sure of its protected entries (from `CERTAIN` on, as far as its uniform budget goes), of `floor` of
    what that has beyond them, and of one entry.

    Args:
        score: (B, H, S); valid: (B, 1 or H, S) bool; budget: (B,) entries per head.

    Returns:
        (B, H) int64 with the sum H * min(budget, entries of the row).
    """
    B, H, S = score.shape
    valid = valid.expand(B, H, S)
    score = score.masked_fill(~valid, float("-inf"))
    place = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    sure = torch.minimum((score >= CERTAIN).sum(-1), budget[:, None])
    more = ((budget[:, None] - sure).clamp(min=0) * floor).floor().long()
    ranked = torch.where(place < (sure + more).clamp(min=1)[..., None], torch.inf, score).masked_fill(
        ~valid, -torch.inf
    )
    order = ranked.flatten(1).argsort(dim=-1, descending=True, stable=True)
    total = H * torch.minimum(budget, valid.sum(-1).amin(1))
    taken = torch.zeros(B, H * S, dtype=torch.long, device=score.device)
    taken.scatter_(1, order, (torch.arange(H * S, device=score.device) < total[:, None]).long())
    return taken.view(B, H, S).sum(-1)


def best_slots(score: Tensor, valid: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """The best slots of every head, ascending; of equal scores the lower index wins.

    Args:
        score: (B, Hkv, S); valid: (B, 1 or Hkv, S); counts: (B,) or (B, Hkv), at most the valid slots.

    Returns:
        (B, Hkv, n) with n the largest count, and (B, Hkv) how many slots in front only fill up where counts differ
        (else None).
    """
    least, n = counts.min().item(), counts.max().item()
    ranked = score.masked_fill(~valid, float("-inf")).sort(dim=-1, descending=True, stable=True).indices[..., :n]
    if least == n:
        return ranked.sort(dim=-1).values, None
    counts = counts.view(len(counts), -1, 1).expand(-1, score.shape[1], -1).to(score.device, non_blocking=True)
    real = torch.arange(n, device=score.device) < counts
    # slots that only fill up go in front, so that real ones stay the newest
    at = torch.where(real, ranked, ranked - score.shape[-1]).argsort(-1)
    return ranked.gather(-1, at), n - counts[..., 0]


def worst_slot(score: Tensor, order: Tensor) -> Tensor:
    """(B, Hkv, 1): the slot of every head with the lowest score; of equal ones the youngest (highest order) goes."""
    return order.masked_fill(score > score.amin(-1, keepdim=True), -1).argmax(-1, keepdim=True)


def protect(score: Tensor, *masks: Tensor | None) -> Tensor:
    """The score with the entries of the `masks` above all others, those that are +inf in it included."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return score
    return score.clamp(max=CERTAIN).masked_fill(functools.reduce(torch.logical_or, given), torch.inf)
