"""FlashVID: of every frame tokens that are important and unlike each other, and trees over time of the others."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.budget import check_share, shares
from hf_compress.methods.base import VisionMethod, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.cluster import density_peaks
from hf_compress.tensors.diversity import farthest
from hf_compress.tensors.frames import scenes, transitions
from hf_compress.tensors.merge import by_owner
from hf_compress.tensors.select import identity

__all__ = ["FlashVID"]

NEIGHBOURS = 7  # of a tree, over which its density is taken


@register("flashvid", stage="vision", kind="video", paper="arXiv:2602.08024", needs={"visual", "video", "cls"})
@dataclass
class FlashVID(VisionMethod):
    """Attention times distance picks tokens of every frame; what is left is joined into trees over time and clustered.

    On the embeddings (n, T * N, D) of a whole video: 1. It is cut into scenes where the cosine of the means of two
    frames is below `threshold`, and at the lowest ones until there are `least` scenes. 2. The K tokens are shared
    evenly over the frames; of its b a frame picks b - floor(b * `merged`). The first is the token with the largest a *
    (distance to its nearest other), a being the attention that it receives and distance 1 - cosine; each later one has
    the largest a * (distance to the nearest pick). 3. Of the other tokens of a scene each hangs on the one of the frame
    before that is most like it, if their cosine is above `alike`, the most alike first as long as there are as many
    trees as the scene has tokens left to keep. A tree is the mean of its tokens and stands where its earliest one
    stood. 4. The trees that begin in a frame are clustered into its share of what is left, in proportion
    (`density_peaks`, 7 neighbours): plain means of trees in the slots of their centres. In the order of time. `ratio`
    is the fraction of the whole video. Cost O(N^2 * D) per frame for each of picks, trees and clusters.

    An image is a scene of one frame: picks, and clusters of the others.

    Source: "FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging",
    ICLR 2026, arXiv:2602.08024. The authors keep a quarter more tokens than asked for and cut in the language model, to
    three tenths before layer 20 of 28: `compress(["flashvid", "fastv"], ratio=[...], layer=20)`. Their code adds up
    chains without dividing by all of their members, and sends the picks of a scene of one frame to the clusters once
    more; here means are means, and a token goes to one place. Its scripts also multiply a by the product of a token
    with the means of the frames, which may be negative; that is not there.

    Args:
        least: scenes of a video, at least, as far as it has frames.
        threshold: cosine of two frames below which a scene ends.
        merged: share of the tokens that are trees.
        alike: cosine above which a token hangs on one of the frame before.

    Raises:
        ValueError: `least` is not an integer of at least 1, `threshold` or `alike` not a number from -1 to 1, `merged`
            not one of [0, 1).
    """

    least: int = 8
    threshold: float = 0.9
    merged: float = 0.3
    alike: float = 0.8

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("least", self.least)
        check_number("threshold", self.threshold, -1, 1)
        check_share(self.merged, "merged")
        check_number("alike", self.alike, -1, 1)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Kept tokens (n, K), groups and weights (n, T * N)."""
        n, V, frames = len(tokens), tokens.count, len(tokens.grids)
        if keep == V:
            return Assignment(identity(n, V, tokens.device))
        x = tokens.embeddings.detach().float().unflatten(1, (frames, -1))
        score = tokens.attention(surrogate="all").mean(1).unflatten(1, (frames, -1))
        cuts = scenes(transitions(x), self.threshold, self.least).tolist()
        each = shares(keep, [1.0] * frames, [V // frames] * frames)
        share = check_share(self.merged, "merged")
        picked = picks(x, score, [b - int(b * share) for b in each])
        owner, weight = (
            torch.stack(both) for both in zip(*[self.reduced(*mine, each) for mine in zip(x, picked, cuts)])
        )
        groups, kept = by_owner(owner)
        return Assignment(kept, groups, weight)

    def reduced(self, x: Tensor, picked: Tensor, cuts: list[int], each: list[int]) -> tuple[Tensor, Tensor]:
        """Of each token of one video (T, N, D) the token whose slot it goes to, and its weight there."""
        frames, N, _ = x.shape
        own = torch.arange(frames * N, device=x.device)
        owner, weight, start = torch.where(picked.flatten(), own, -1), picked.flatten().float(), 0
        for length in (len(list(scene)) for _, scene in groupby(cuts)):
            mine = slice(start, start + length)
            quota = sum(each[mine]) - int(picked[mine].sum())
            root = start * N + trees(x[mine], picked[mine], self.alike, quota)
            loose = own[start * N : (start + length) * N][~picked[mine].flatten()]
            top, size = root.unique(return_counts=True)  # roots, ascending
            member = torch.searchsorted(top, root)
            total = torch.zeros(len(top), x.shape[-1], device=x.device).index_add(0, member, x.flatten(0, 1)[loose])
            centre = clusters(total / size[:, None], top // N, quota)
            joined = torch.bincount(centre[centre >= 0], minlength=len(top))
            goes = centre[member]
            owner[loose] = torch.where(goes < 0, -1, top[goes.clamp(min=0)])
            weight[loose] = torch.where(goes < 0, 0, 1 / (size[member] * joined[goes.clamp(min=0)].clamp(min=1)))
            start += length
        return owner, weight


def picks(x: Tensor, score: Tensor, counts: list[int]) -> Tensor:
    """(n, T, N) bool: of each frame (n, T, N, D) so many tokens that are important and unlike each other."""
    out = torch.zeros_like(score, dtype=torch.bool)
    for count in set(counts) - {0}:
        at = [t for t, other in enumerate(counts) if other == count]
        found = farthest(x[:, at].flatten(0, 1), count, weight=score[:, at].flatten(0, 1))
        out[:, at] = out[:, at].scatter(2, found.unflatten(0, (len(x), -1)), True)
    return out


def trees(x: Tensor, picked: Tensor, alike: float, least: int) -> Tensor:
    """Of each token of a scene (m, N, D) that is not picked, (m, N) bool, the earliest one of its tree; `least` trees.

    Ties: the earlier partner; of equally strong bonds those of the earlier tokens hold.
    """
    m, N, _ = x.shape
    unit, loose = F.normalize(x, dim=-1), ~picked
    similar = (unit[1:] @ unit[:-1].mT).masked_fill_(~loose[:-1, None], -torch.inf)
    bond, partner = (t.flatten() for t in similar.max(-1))
    bond = torch.where(loose[1:].flatten(), bond, -torch.inf)
    most = max(0, int(loose.sum()) - least)
    strongest = bond.argsort(descending=True, stable=True)[:most]
    holds = torch.zeros_like(bond, dtype=torch.bool).scatter(0, strongest, bond[strongest] > alike).view(m - 1, N)
    root = torch.arange(m * N, device=x.device).view(m, N)
    for t in range(1, m):
        root[t] = torch.where(holds[t - 1], root[t - 1][partner.view(m - 1, N)[t - 1]], root[t])
    return root[loose]


def clusters(x: Tensor, frame: Tensor, count: int) -> Tensor:
    """(trees,): of each tree (trees, D) the place of the one that it is merged into; `count` over all frames."""
    found, sizes = frame.unique(return_counts=True)
    out = torch.full_like(frame, -1)
    each = shares(count, [Fraction(s) for s in sizes.tolist()], sizes.tolist()) if count else [0] * len(found)
    for t, many in zip(found.tolist(), each):
        at = (frame == t).nonzero()[:, 0]
        if many:
            centres, groups = (c[0] for c in density_peaks(x[at][None], many, NEIGHBOURS))
            out[at] = at[centres[groups]]
    return out
