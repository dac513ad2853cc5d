"""Subsets of tokens that differ from each other: pure functions from embeddings to token indices.

All are greedy, decided without gradient and in fp32. Nothing here waits for the device, and of equal candidates the
one with the lower index is picked.
"""

from __future__ import annotations

import math
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["coverage", "determinantal", "facilities", "farthest", "nearest_distance", "unrepeated"]

TINY = 1e-30  # a weight that is next to nothing, of which infinity is still infinity
ROUNDING = 1e-5  # of the square of a vector: less is nothing in fp32
CHUNK = 2**24  # most similarities held at once (64 MiB)


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
def farthest(
    x: Tensor, k: int, first: Tensor | None = None, *, total: bool = False, weight: Tensor | None = None
) -> Tensor:
    """(n, N, D) tokens to the (n, k) ascending indices of a greedy max-min subset by cosine distance.

    Each pick is the token whose smallest distance to the picks so far is largest; with `total` (max-sum) the sum of its
    distances to them. fp32. Cost O(n * N^2 * D). Up to `CHUNK` similarities (N = 4096 for one image) are computed at
    once and kept; beyond that the first pick takes them in chunks of rows, each later one computes its own row, and
    memory is O(n * N) beside the normalised copy of `x`.

    Args:
        first: (n,) the first pick; None: the token whose nearest neighbour is farthest.
        weight: (n, N), not negative, by which the distance of each token to whichever other is multiplied; None: 1.
    """
    n, N, D = x.shape
    scale: Any = None if weight is None else weight.float().clamp(min=TINY)
    x = F.normalize(x.float(), dim=-1)
    start: Any = torch.arange(0, n * N, N, device=x.device)
    rows: Any = x @ x.mT if n * N * N <= CHUNK else None
    xp: Any = torch
    if rows is None:
        pick: Any = _least(1 - nearest_distance(x), scale) if first is None else first
    else:
        diagonal = rows.diagonal(0, 1, 2)
        diagonal.fill_(-math.inf)
        pick = _least(rows.amax(dim=-1), scale) if first is None else first
        diagonal.fill_(math.inf)  # a pick is nearest to itself, and not picked again
        rows = rows.view(n * N, N)
        if x.device.type == "cpu":  # the picks are many small calls, which numpy starts four times faster
            xp, start, rows, pick = numpy, start.numpy(), rows.numpy(), pick.numpy()
            scale = None if scale is None else scale.numpy()

    def similar(pick: Any) -> Any:
        """(n, N): similarity of every token to the one picked."""
        if rows is not None:
            return rows.take(start + pick, 0) if xp is numpy else rows[start + pick]
        chosen = x.view(n * N, D).index_select(0, start + pick)
        return (x @ chosen[..., None]).squeeze(-1).scatter_(1, pick[:, None], math.inf)

    join = xp.add if total else xp.maximum
    picks, closest = [pick], similar(pick)  # sum, or highest, of the similarities to the picks so far
    while len(picks) < k:
        picks.append(_least(closest, scale))
        join(closest, similar(picks[-1]), out=closest)
    picked = torch.from_numpy(numpy.stack(picks, 1)) if xp is numpy else torch.stack(picks, 1)
    return picked.sort(dim=1).values


def _least(similar: Any, scale: Any) -> Any:
    """(n,): the token of the largest distance, 1 - `similar` (n, N), times its scale."""
    return (similar if scale is None else scale * (similar - 1)).argmin(1)


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
def coverage(x: Tensor, weight: Tensor, k: int) -> Tensor:
    """(n, k) indices in the order of the picks: greedily what covers most of the tokens, times its weight.

    A pick covers every token by its cosine to it: c_i, at first 0, is the largest cosine of token i to a pick. The next
    is the unpicked j of the largest weight_j * sum_i max(0, cos_ij - c_i), picked tokens i included. fp32. Cost
    O(n * N^2 * D) for the cosines, which are kept up to `CHUNK` of them and computed anew beyond. An accelerator then
    sums all gains at every pick, O(N^2), and waits for nothing. On a CPU, and beyond `CHUNK`, gains are summed when
    their turn comes: they only fall, so that of the last known ones the largest is right if it is new; O(N) for each of
    a few per pick.

    Args:
        x: (n, N, D) tokens; weight: (n, N), not negative.
    """
    x, weight = F.normalize(x.float(), dim=-1), weight.float()
    whole = x @ x.mT if len(x) * x.shape[1] ** 2 <= CHUNK else None
    if whole is not None and x.device.type != "cpu":
        return _covering_all(whole, weight, k)
    picks = [_covering(x[i], None if whole is None else whole[i], weight[i], k) for i in range(len(x))]
    return torch.tensor(picks, device=x.device)


@torch.no_grad()
def facilities(x: Tensor, bonus: Tensor, k: int) -> Tensor:
    """(n, k) indices in the order of the picks: greedily what represents most of the tokens, and has a bonus.

    The similarity of two tokens is their cosine scaled to [0, 1]; the next pick is the token that raises sum over i of
    the largest similarity of i to a pick, plus the `bonus` of all picks, most. fp32. Cost O(n * N^2 * D) for the
    similarities, of one sequence after the other, and O(n * k * N^2) additions.

    Args:
        x: (n, N, D) tokens; bonus: (n, N).
    """
    return torch.stack(
        [_facilities(rows, more, k) for rows, more in zip(F.normalize(x.float(), dim=-1), bonus.float())]
    )


def _facilities(x: Tensor, bonus: Tensor, k: int) -> Tensor:
    """`facilities` of unit vectors (N, D)."""
    similar = (x @ x.T).add_(1).div_(2)
    covered, bonus, picks = torch.zeros_like(bonus), bonus.clone(), []
    for _ in range(k):
        gain = (similar - covered).clamp_(min=0).sum(1) + bonus
        picks.append(gain.argmax())
        covered = torch.maximum(covered, similar[picks[-1]])
        bonus[picks[-1]] = -math.inf
    return torch.stack(picks)


def _covering_all(cosines: Tensor, weight: Tensor, k: int) -> Tensor:
    """`coverage` of cosines (n, N, N), every gain summed at every pick."""
    covered, picks, images = torch.zeros_like(weight), [], torch.arange(len(weight), device=weight.device)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(k):
        gain = (cosines - covered[:, None]).clamp_(min=0).sum(-1)
        picks.append((gain * weight).masked_fill_(gone, -math.inf).argmax(1))
        gone[images, picks[-1]] = True
        covered = torch.maximum(covered, cosines[images, picks[-1]])
    return torch.stack(picks, 1)


def _covering(x: Tensor, cosines: Tensor | None, weight: Tensor, k: int) -> list[int]:
    """`coverage` of unit vectors (N, D), gains summed when their turn comes; of cosines (N, N), if those are kept."""
    N = len(x)
    parts = [cosines] if cosines is not None else x.split(max(1, CHUNK // N))  # of rows
    gain = [(part if cosines is not None else part @ x.T).clamp(min=0).sum(1) for part in parts]
    score = torch.cat(gain).mul_(weight).cpu().numpy()
    share, covered, known, picks = weight.tolist(), numpy.zeros(N, numpy.float32), [0] * N, []
    rows = None if cosines is None else cosines.numpy()  # many small calls, which numpy starts faster
    for step in range(k):
        while True:
            best = int(score.argmax())
            row = (x @ x[best]).cpu().numpy() if rows is None else rows[best]
            if known[best] == step:
                break
            score[best], known[best] = share[best] * numpy.maximum(row - covered, 0).sum(), step
        picks.append(best)
        score[best] = -math.inf
        covered = numpy.maximum(covered, row)
    return picks


@torch.no_grad()
def unrepeated(x: Tensor, order: Tensor, k: int, step: int) -> Tensor:
    """(n, k) of the tokens `order` (n, M), best first, that are left when repetitions go round by round.

    In a round every token at an even place looks for the most similar one at an odd place (cosine), and the `step` that
    find the most similar ones go; those that stay, by falling similarity, come before those at odd places then. fp32;
    ties: the earlier one. Cost O(n * N^2 * D) for the cosines, which are kept up to `CHUNK` of them, and (M - k) / step
    rounds that look at M^2 / 4 of them at most; beyond `CHUNK` a round computes what it looks at.

    Args:
        x: (n, N, D) tokens; order: (n, M) int64; k: from 1 to M.
    """
    n, N, D = x.shape
    x = F.normalize(x.float(), dim=-1)
    whole = (x @ x.mT).view(n * N, N) if n * N * N <= CHUNK else None
    first = torch.arange(0, n * N, N, device=x.device)[:, None]

    def closest(some: Tensor, others: Tensor) -> Tensor:
        """(n, A): the largest cosine of each of `some` (n, A) to any of `others` (n, B)."""
        if whole is not None:
            rows = whole.index_select(0, (some + first).flatten()).view(n, -1, N)
            return rows.gather(2, others[:, None].expand(-1, rows.shape[1], -1)).amax(-1)
        columns = x.gather(1, others[..., None].expand(-1, -1, D)).mT
        parts = some.split(max(1, CHUNK // others.numel()), dim=1)
        return torch.cat([(x.gather(1, p[..., None].expand(-1, -1, D)) @ columns).amax(-1) for p in parts], 1)

    while (left := order.shape[1]) > k:
        even, odd = order[:, ::2], order[:, 1::2]
        falling = closest(even, odd).argsort(dim=1, descending=True, stable=True)
        order = torch.cat([even.gather(1, falling[:, min(step, left - k) :]), odd], 1)
    return order
