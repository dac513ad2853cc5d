"""Which tokens become one: pure functions to group maps, (n, N) int64 with the output row of every token.

A group map is a decision and carries no gradient; `Assignment.apply` turns it into vectors. Nothing here
waits for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.tensors.ranking import largest

__all__ = [
    "bipartite",
    "bipartite_above",
    "by_first",
    "by_owner",
    "first_members",
    "group_sum",
    "matched",
    "nearest",
    "pool1d",
    "pool_cells",
    "proposals",
    "rank",
]


def group_sum(x: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sum of `x`, (n, m) or (n, m, D), over each of `count` groups: (n, count) or (n, count, D)."""
    out = x.new_zeros(x.shape[0], count, *x.shape[2:])
    return out.scatter_add(1, groups if x.dim() == 2 else groups[..., None].expand_as(x), x)


def group_softmax(logits: Tensor, groups: Tensor, count: int) -> Tensor:
    """Shares that sum to one over each of `count` groups (n, m), of logits (n, m) or (n, m, H); 0 where it is -1."""
    at = groups % (count + 1)
    index = at if logits.ndim == 2 else at[..., None].expand_as(logits)
    least = logits.new_full((len(at), count + 1, *logits.shape[2:]), -torch.inf)
    top = least.scatter_reduce(1, index, logits.detach(), "amax").gather(1, index)
    e = (logits - top).exp()
    share = e / group_sum(e, at, count + 1).gather(1, index)
    return share.masked_fill((index == count), 0)


def rank(kept: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(n, K) ascending indices to a (n, tokens) mask of them and each kept token's place among them."""
    mask = torch.zeros(kept.shape[0], tokens, dtype=torch.int64, device=kept.device).scatter_(1, kept, 1)
    return mask.bool(), mask.cumsum(1) - 1


def first_members(groups: Tensor, count: int) -> Tensor:
    """(n, count): the smallest member of each of `count` groups, in the order of the groups."""
    place = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)
    none = torch.full((groups.shape[0], count), groups.shape[1], device=groups.device)
    return none.scatter_reduce(1, groups, place, "amin")


def by_first(groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers `count` non-empty groups in the order of their smallest member.

    Returns:
        groups (n, m) under the new numbers, and kept (n, count): the smallest member of each group,
            ascending.
    """
    kept, order = first_members(groups, count).sort(dim=1)
    return order.argsort(dim=1).gather(1, groups), kept


def by_owner(owner: Tensor) -> tuple[Tensor, Tensor]:
    """(n, N): the token whose slot each token goes to, -1 for none, the same number of slots in all n.

    Returns:
        groups (n, N), -1 for none, and kept (n, count): the slots, ascending.
    """
    kept = torch.stack([mine[mine >= 0].unique() for mine in owner])
    place = rank(kept, owner.shape[1])[1].gather(1, owner.clamp(min=0))
    return place.masked_fill(owner < 0, -1), kept


@torch.no_grad()
def bipartite(metric: Tensor, remove: int, protect_first: bool = False) -> Tensor:
    """One step of bipartite soft matching: (n, m, d) metric to the groups (n, m) of m - remove outputs.

    Even places form A, odd ones B. Every A token proposes its best cosine partner in B; the `remove`
    strongest proposals become merges (ties: lower index). With `protect_first` token 0, which is in A,
    proposes nothing. Outputs are numbered as the authors order them, which fixes who is even and odd in a
    following step: what is left of A (by falling strength, or in its own order with `protect_first`), then B.
    fp32, cost O(n * m^2 / 4 * d).

    Raises:
        ValueError: `remove` is negative or above (m - protect_first) // 2.
    """
    n, m, _ = metric.shape
    most = (m - protect_first) // 2
    if not 0 <= remove <= most:
        raise ValueError(f"remove={remove}: one step removes 0 to {most} of {m} tokens; take more steps")
    if m == 1:
        return torch.zeros(n, 1, dtype=torch.int64, device=metric.device)
    edge, partner = proposals(metric, protect_first)
    order = edge.argsort(dim=1, descending=True, stable=True)
    merged, left = order[:, :remove], order[:, remove:]
    if protect_first:
        left = left.sort(dim=1).values
    stay = left.shape[1]
    even = torch.empty_like(partner).scatter_(1, left, torch.arange(stay, device=left.device).expand_as(left))
    even.scatter_(1, merged, stay + partner.gather(1, merged))
    groups = torch.empty(n, m, dtype=torch.int64, device=metric.device)
    groups[:, ::2] = even
    groups[:, 1::2] = torch.arange(stay, stay + m // 2, device=metric.device)
    return groups


@torch.no_grad()
def matched(x: Tensor, sizes: Tensor, keep: int, *, protect_first: bool = False) -> tuple[Tensor, Tensor]:
    """Bipartite steps until `keep` of the m tokens `x` (n, m, d) are left, each of at most half of them.

    Returns:
        groups (n, m) int64, and what the groups weigh, (n, keep), `sizes` (n, m) being the weights of the tokens.
    """
    x, left = x.float(), x.shape[1]
    groups = torch.arange(left, device=x.device).repeat(len(x), 1)
    while left > keep:
        r = min((left - protect_first) // 2, left - keep)
        left -= r
        step, weighed = bipartite(x, r, protect_first=protect_first), x * sizes[..., None]
        groups, sizes = step.gather(1, groups), group_sum(sizes, step, left)
        if left > keep:
            x = group_sum(weighed, step, left) / sizes[..., None]
    return groups, sizes


@torch.no_grad()
def proposals(metric: Tensor, protect_first: bool = False) -> tuple[Tensor, Tensor]:
    """What every A token of `bipartite` proposes: cosine (n, A) of its best partner, and the place of that in B.

    With `protect_first` the proposal of token 0 is -inf. There must be a token in B.
    """
    unit = F.normalize(metric.float(), dim=-1)
    edge, partner = largest(unit[:, ::2] @ unit[:, 1::2].mT)
    if protect_first:
        edge[:, 0] = -math.inf
    return edge, partner


@torch.no_grad()
def bipartite_above(metric: Tensor, threshold: float, protect_first: bool = False) -> tuple[Tensor, Tensor]:
    """One step as `bipartite` that merges all proposals above a cosine: as many as there are in each sequence.

    Returns:
        groups (n, m) int64, outputs numbered in the order of what is left of A, then B; and (n, most) bool: the last
            ones are outputs, False at the left where a sequence has fewer (no token goes there).
    """
    n, m, _ = metric.shape
    if m == 1:
        one = torch.zeros(n, 1, dtype=torch.int64, device=metric.device)
        return one, one == 0
    edge, partner = proposals(metric, protect_first)
    stays = edge <= threshold
    left = stays.sum(1, keepdim=True)
    fill = left.max() - left
    groups = torch.empty(n, m, dtype=torch.int64, device=metric.device)
    groups[:, ::2] = fill + torch.where(stays, stays.cumsum(1) - 1, left + partner)
    groups[:, 1::2] = fill + left + torch.arange(m // 2, device=metric.device)
    return groups, torch.arange(int(left.max()) + m // 2, device=metric.device) >= fill


def pool1d(tokens: int, k: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """`tokens` in a row cut into k windows as equal as can be, 1 <= k <= tokens.

    Returns:
        groups (tokens,): token i is in window i * k // tokens; centres (k,): middle of each window, rounded
            down.
    """
    edge = -(-torch.arange(k + 1, device=device) * tokens // k)
    return torch.arange(tokens, device=device) * k // tokens, (edge[:-1] + edge[1:] - 1) // 2


def pool_cells(h: int, w: int, kh: int, kw: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """An (h, w) grid cut into (kh, kw) cells, `pool1d` along both sides: groups (h * w,), centres (kh * kw,).

    Both are in raster order, centres ascending; every token belongs to exactly one cell.
    """
    (row, top), (col, mid) = pool1d(h, kh, device), pool1d(w, kw, device)
    return (row[:, None] * kw + col).flatten(), (top[:, None] * w + mid).flatten()


@torch.no_grad()
def nearest(keys: Tensor, targets: Tensor, fits: Tensor | None = None) -> Tensor:
    """(n, N, d) keys and (n, t) token indices to (n, N): place in `targets` of the most similar one (cosine).

    fp32; ties go to the earlier target, though a target goes to itself. Cost O(n * N * t * d).

    Args:
        fits: (n, N, t) bool, which targets each token may go to; -1 where there is none. None: all.
    """
    keys = keys.float()
    chosen = F.normalize(keys.gather(1, targets[..., None].expand(-1, -1, keys.shape[-1])), dim=-1)
    similar = keys @ chosen.mT  # the length of a key changes nothing in its own order
    if fits is None:
        return similar.max(dim=-1).indices
    itself = targets[:, None] == torch.arange(keys.shape[1], device=keys.device)[:, None]
    similar = similar.masked_fill_(itself, math.inf).masked_fill_(~fits, -math.inf)
    return torch.where(fits.any(-1), similar.max(dim=-1).indices, -1)
