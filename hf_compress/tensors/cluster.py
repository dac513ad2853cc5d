"""Clusters of tokens: pure functions from vectors to group maps, as of `merge`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.tensors.merge import group_sum
from hf_compress.tensors.ranking import largest

__all__ = ["condense", "density_peaks", "kmeans", "none_empty"]


@torch.no_grad()
def kmeans(x: Tensor, first: Tensor, steps: int) -> Tensor:
    """(n, N) groups of spherical k-means: (n, N, D) tokens by cosine to C centres.

    Every one of the `steps` sends each token to the most similar centre (ties: the earlier one) and then makes each
    centre the mean direction of its tokens; one without any keeps its direction. Groups are those of the last step, but
    for centres that have none then, see `none_empty`. fp32. Cost O(steps * n * N * C * D).

    Args:
        first: (n, C) the tokens at which the centres start, C from 1 to N.
    """
    C = first.shape[1]
    x = F.normalize(x.float(), dim=-1)
    centre = x.gather(1, first[..., None].expand(-1, -1, x.shape[-1]))
    for step in range(steps):
        nearness, groups = largest(x @ centre.mT)
        if step < steps - 1:
            total = group_sum(x, groups, C)
            met = group_sum(torch.ones_like(nearness), groups, C)[..., None] > 0
            centre = torch.where(met, F.normalize(total, dim=-1), centre)
    return none_empty(groups, nearness, C)


@torch.no_grad()
def density_peaks(x: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Clusters around what is dense and far from anything denser (DPC-kNN): (n, N, D) tokens to `count` groups.

    With dist_ij = |x_i - x_j| / sqrt(D) the density of a token is exp(-mean of its `neighbours` smallest dist^2, its
    own zero among them), its reach the distance to the nearest denser token (of the densest one: that of the farthest
    pair of all). The tokens of the highest density * reach are centres, the others go to the nearest one. Of equally
    dense tokens the earlier counts as denser. fp32, cost O(n N^2 D), memory O(n N^2).

    Args:
        count: 1 to N; neighbours: at least 1, more than N count as N.

    Returns:
        centres (n, count), ascending, and groups (n, N): of each token the place of its centre among them.
    """
    x = x.float()
    _, N, D = x.shape
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / D**0.5
    near = distance.topk(min(neighbours, N), dim=-1, largest=False).values
    density = (-near.square().mean(-1)).exp()
    order = density.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(N, device=x.device).expand_as(order))
    denser = place[:, None] < place[:, :, None]  # (n, i, j): j is denser than i
    farthest = distance.flatten(1).amax(1)[:, None]
    reach = torch.where(place == 0, farthest, distance.masked_fill(~denser, float("inf")).amin(-1))
    score = density * reach
    centres = score.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
    to = distance.gather(2, centres[:, None].expand(-1, N, -1))
    itself = centres[:, None] == torch.arange(N, device=x.device)[:, None]
    return centres, to.masked_fill(itself, -1).argmin(-1)


@torch.no_grad()
def condense(x: Tensor, cells: Tensor, count: int, neighbours: int, own: float | None = None) -> tuple[Tensor, Tensor]:
    """`count` of S cells by `density_peaks`, each of which is the mean of m tokens, and the others merged into them.

    Args:
        x: (V, D) tokens; cells: (S, m) int64, those of each cell.
        count: 0 to S, cells that stay; with 0 all vanish.
        own: what a centre has of itself, the mean of its others has the rest; None: the mean of all.

    Returns:
        (S, m) int64, the first token of the centre that each token goes to (-1: none), and (S, m) its weight there.
    """
    S, m = cells.shape
    if count == 0:
        return torch.full_like(cells, -1), torch.zeros(S, m, device=x.device)
    centres, groups = (t[0] for t in density_peaks(x[cells].float().mean(1)[None], count, neighbours))
    size = torch.bincount(groups, minlength=count)[groups]
    weight = 1 / size
    if own is not None:
        weight = (1 - own) / (size - 1)
        weight[centres] = torch.where(size[centres] == 1, 1.0, own)
    return cells[centres[groups], :1].expand(-1, m), (weight / m)[:, None].expand(-1, m)


@torch.no_grad()
def none_empty(groups: Tensor, nearness: Tensor, count: int) -> Tensor:
    """The `groups` (n, N) with a member in each of `count`, at most N.

    Groups without one get, in their order, the tokens of the lowest `nearness` (n, N) to what they are grouped by; the
    nearest member of every group stays in it.
    """
    n, N = groups.shape
    order = nearness.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(N, device=order.device).expand_as(order))
    best = place.new_full((n, count), N).scatter_reduce(1, groups, place, "amin")
    stays = torch.zeros(n, N + 1, dtype=torch.bool, device=groups.device).scatter_(1, best, True)[:, :N]  # by place
    empty = best == N
    vacant = empty.long().argsort(dim=1, descending=True, stable=True)  # the groups without a member come first
    movable = torch.where(stays, -1, torch.arange(N, device=order.device)).argsort(dim=1, descending=True)[:, :count]
    goes = order.gather(1, movable)
    moved = torch.arange(count, device=groups.device) < empty.sum(1, keepdim=True)
    return groups.scatter(1, goes, torch.where(moved, vacant, groups.gather(1, goes)))
