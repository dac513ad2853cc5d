"""Which tokens stay: pure functions from scores, counts or embeddings to ascending token indices.

Nothing here waits for the device (but `best_slots` for its counts, if they are there), and equal scores are broken
the same way everywhere: the lower index wins.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "adaptive",
    "best_slots",
    "determinantal",
    "farthest",
    "identity",
    "nearest_distance",
    "protect",
    "spaced",
    "spaced_grid",
    "top_by_part",
    "top_sorted",
    "worst_slot",
]

CERTAIN = 1e37  # scores from here on are protections: those of a method, and +inf above them
ROUNDING = 1e-5  # of the square of a vector: less is nothing in fp32
CHUNK = 2**24  # most similarities held at once by `nearest_distance` (64 MiB)


def identity(n: int, tokens: int, device: torch.device | str | None = None) -> Tensor:
    """(n, tokens): every token of n images."""
    return torch.arange(tokens, device=device).repeat(n, 1)


@torch.no_grad()
def top_sorted(score: Tensor, k: int) -> Tensor:
    """(n, N) scores to the (n, k) ascending indices of the k highest of each row; ties: the lower index."""
    return score.argsort(dim=-1, descending=True, stable=True)[:, :k].sort(dim=-1).values


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


def spaced_grid(h: int, w: int, k: int) -> list[int]:
    """k evenly spaced cells of an (h, w) grid as ascending raster indices; exactly k for 1 <= k <= h * w.

    About sqrt(k * h / w) rows are kept, by the rule of `spaced`; each gets k // rows columns, and the rest of
    the division goes to rows picked by the same rule.
    """
    rows = min(max(round(math.sqrt(k * h / w)), 1), h)
    while -(-k // rows) > w:
        rows += 1
    each, extra = divmod(k, rows)
    favoured = set(spaced(rows, extra))
    return [r * w + c for i, r in enumerate(spaced(h, rows)) for c in spaced(w, each + (i in favoured))]


@torch.no_grad()
def nearest_distance(x: Tensor) -> Tensor:
    """(n, N, D) unit vectors to (n, N): cosine distance of each to its nearest other; inf for N = 1.

    Cost O(n * N^2 * D) time; rows are taken in chunks, so memory stays below `CHUNK` similarities.
    """
    n, N, _ = x.shape
    rows = max(1, CHUNK // (n * N))
    best = []
    for start in range(0, N, rows):
        sim = x[:, start : start + rows] @ x.mT
        sim.diagonal(start, 1, 2).fill_(-math.inf)
        best.append(sim.amax(dim=-1))
    return 1 - torch.cat(best, dim=1)


@torch.no_grad()
def farthest(x: Tensor, k: int) -> Tensor:
    """(n, N, D) tokens to the (n, k) ascending indices of a greedy max-min subset by cosine distance.

    The first pick is the token whose nearest neighbour is farthest; each later one is the token whose
    smallest distance to the picks so far is largest. fp32. Cost O(n * N^2 * D). Up to `CHUNK` similarities (N = 4096
    for one image) are computed at once and kept; beyond that the first pick takes them in chunks of rows, each later
    one computes its own row, and memory is O(n * N) beside the normalised copy of `x`.
    """
    n, N, D = x.shape
    x = F.normalize(x.float(), dim=-1)
    first: Any = torch.arange(0, n * N, N, device=x.device)
    rows: Any = x @ x.mT if n * N * N <= CHUNK else None
    xp: Any = torch
    if rows is None:
        pick: Any = nearest_distance(x).argmax(dim=1)
    else:
        diagonal = rows.diagonal(0, 1, 2)
        diagonal.fill_(-math.inf)
        pick = rows.amax(dim=-1).argmin(dim=1)
        diagonal.fill_(math.inf)  # a pick is nearest to itself, and not picked again
        rows = rows.view(n * N, N)
        if x.device.type == "cpu":  # the picks are many small calls, which numpy starts four times faster
            xp, first, rows, pick = numpy, first.numpy(), rows.numpy(), pick.numpy()

    def similar(pick: Any) -> Any:
        """(n, N): similarity of every token to the one picked."""
        if rows is not None:
            return rows.take(first + pick, 0) if xp is numpy else rows[first + pick]
        chosen = x.view(n * N, D).index_select(0, first + pick)
        return (x @ chosen[..., None]).squeeze(-1).scatter_(1, pick[:, None], math.inf)

    picks, closest = [pick], similar(pick)  # highest similarity to the picks so far
    while len(picks) < k:
        picks.append(closest.argmin(1))
        xp.maximum(closest, similar(picks[-1]), out=closest)
    picked = torch.from_numpy(numpy.stack(picks, 1)) if xp is numpy else torch.stack(picks, 1)
    return picked.sort(dim=1).values


@torch.no_grad()
def determinantal(x: Tensor, weight: Tensor, k: int) -> Tensor:
    """(n, k) indices in the order of the picks: greedy MAP of the determinantal process L_ij = w_i * cos_ij * w_j.

    Each pick raises the determinant of the picked ones most: by its diagonal less what the earlier picks explain of it
    (arXiv:1709.05135), here the part of w_i * x_i / |x_i| that is orthogonal to theirs. Tokens of which up to rounding
    nothing is left (all, from D picks on) come last, by their weight. fp32; ties: the lower index. Cost
    O(n * k * (N + k) * D), memory O(n * (N + k) * D).

    Args:
        x: (n, N, D) tokens; weight: (n, N), from above 0 to 1.
    """
    (n, _, D), rows = x.shape, torch.arange(len(x), device=x.device)
    x = F.normalize(x.float(), dim=-1) * weight[..., None]
    whole, basis, picks = weight.float().square(), x.new_zeros(n, k, D), []
    left, gone = whole.clone(), torch.zeros_like(weight, dtype=torch.bool)
    for step in range(k):
        rank = torch.where(left > ROUNDING * whole, left, weight - 2).masked_fill_(gone, -math.inf)
        pick = rank.argmax(1)
        picks.append(pick)
        gone[rows, pick] = True
        new, known = x[rows, pick], basis[:, :step]
        for _ in range(2):  # once more: what rounding has left of the others
            new = new - ((new[:, None] @ known.mT) @ known)[:, 0]
        basis[:, step] = F.normalize(new, dim=-1).masked_fill_((rank[rows, pick] < 0)[:, None], 0)
        left = left - (x @ basis[:, step, :, None])[..., 0].square()
    return torch.stack(picks, 1)


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
