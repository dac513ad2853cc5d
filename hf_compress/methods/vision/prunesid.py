"""PruneSID: groups of tokens by principal components, of each its most salient tokens that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.budget import shares
from hf_compress.methods.base import VisionMethod, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.counts import mean_cosine
from hf_compress.tensors.select import suppressed, top_by_part
from hf_compress.tensors.svd import principal

__all__ = ["PruneSID"]


@register("prunesid", stage="vision", kind="crops", paper="arXiv:2603.09480", needs={"visual", "cls"})
@dataclass
class PruneSID(VisionMethod):
    """Images that repeat themselves keep fewer tokens; salient ones stay of every principal component.

    On what the projector reads (N, Dv) and the [CLS] row (head sum) of every crop of all images of a sample: 1. phi =
    1 - the mean cosine of all pairs of its tokens; the crops of the sample share its budget in proportion to their
    tokens times phi, so that a single image keeps what `ratio` says. 2. Of the logistic of its features, the channels
    being samples, K // 4 principal directions are taken; a token belongs to the one in which it is largest. 3. In each
    group tokens are taken by falling attention, and those that a taken one resembles (cosine above 18 * K / N * (1 -
    phi)) are put back. 4. Every group keeps one token and a share of the rest by how many it took (`quotas`): those
    taken first, then those put back. Raster order. `ratio="adaptive"` keeps N * share * phi / phi0 tokens of each crop.
    Cost O(N^2 * Dv), chunked, and the directions O(N * Dv * K).

    More tokens can answer less: from K = N / (18 * (1 - phi)) on the threshold of step 3 is above 1 and nothing is put
    back, so that groups keep neighbours on one object until there are groups enough. On demo:llava (N = 196, mean 1 -
    phi .64: from K = 18 on), 200 questions on 50 images: 12 tokens in 3 groups, threshold .70, 13 not put back, some
    token on 97.6 % of the objects, 95.0 % right; 22 in 5 groups, 1.29, all 196, on 88.0 %, 87.5 % right (with the .70:
    99.3 and 96.0 %; 12 with the 1.29: 74.3 and 75.0 %); 30 in 7 groups 94.3 and 94.0 %; 49 in 12 groups 99.0 and
    97.5 %. The authors' code with this threshold, on the same features: 93.5, 89.0, 94.0 % right at 12, 22, 30.

    Source: "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic Importance-Diversity",
    arXiv:2603.09480. Its code keeps the same number of every image; the budget is the paper's. Its threshold has the
    factor K / 32 for the 576 tokens of LLaVA-1.5 and 18 * K / N for those of Qwen2-VL, there at least 1; here the
    latter, without that floor. The code finds the directions from a random start, here it is always the same one; it
    emits [CLS] as one of the K tokens, which no prompt has a slot for; its Qwen2-VL reads merged tokens and ranks by
    the directions alone, here every tower is read in front of the projector, without [CLS] by the attention received.

    Args:
        share, phi0: of "adaptive": the part of its tokens that an image of this phi keeps.

    Raises:
        ValueError: `share` is not a number above 0 and at most 1, `phi0` not one above 0 and at most 2.
    """

    share: float = 1 / 9
    phi0: float = 1.0

    scope: ClassVar[str] = "sample"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("share", self.share, 0, 1, above=True)
        check_number("phi0", self.phi0, 0, 2, above=True)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int | None) -> Assignment:  # type: ignore[override]
        """Selection (n, K); ties go to the lower index."""
        sizes = [h * w for h, w in tokens.grids]
        x, score = tokens.features.detach().float().split(sizes, 1), tokens.attention(surrogate="all").sum(1)
        phi = 1 - torch.stack([mean_cosine(part) for part in x], 1)
        counts = self.counts(sizes, phi, keep)
        stays = torch.zeros_like(score, dtype=torch.bool)
        for p, (part, salient) in enumerate(zip(x, score.split(sizes, 1))):
            start = sum(sizes[:p])
            for k in {mine[p] for mine in counts}:
                rows = torch.tensor([i for i, mine in enumerate(counts) if mine[p] == k], device=stays.device)
                stays[rows, start : start + sizes[p]] = chosen(part[rows], salient[rows], phi[rows, p], k)
        return Assignment.selection(stays)

    def counts(self, sizes: Sequence[int], phi: Tensor, keep: int | None) -> list[list[int]]:
        """How many tokens of every crop stay, of so many and of this phi (n, P)."""
        weights = [[n * max(0.0, f) for n, f in zip(sizes, mine)] for mine in phi.tolist()]
        if keep is not None:
            return [shares(keep, mine, sizes) for mine in weights]
        scale = self.share / self.phi0
        return [[min(n, max(1, round(scale * w))) for n, w in zip(sizes, mine)] for mine in weights]


def chosen(x: Tensor, score: Tensor, phi: Tensor, keep: int) -> Tensor:
    """(n, N) bool: which `keep` of the tokens (n, N, D) stay, by their score (n, N)."""
    N, D = x.shape[1:]
    if keep in (0, N):
        return torch.full_like(score, bool(keep), dtype=torch.bool)
    directions = principal(x.sigmoid().mT, max(1, min(keep // 4, D)))
    group = directions.abs().argmax(-1)
    taken = ~suppressed(x, score, group, 18 * keep / N * (1 - phi))
    groups = F.one_hot(group, directions.shape[-1])
    size, first = groups.sum(1).tolist(), (groups * taken[..., None]).sum(1).tolist()
    counts = torch.tensor([quotas(*both, keep) for both in zip(size, first)], device=x.device)
    order = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return top_by_part(N * taken - order, group, counts)


def quotas(size: Sequence[int], taken: Sequence[int], keep: int) -> list[int]:
    """How many tokens each group keeps, `keep` together, of those that it has and those of them that were taken.

    One of each, the rest in proportion to what was taken, but of no group more than it took, nor than 5 for every 64
    kept; where that does not add up these limits are raised for all by one and one. What the limits leave over goes to
    the groups that took most.
    """
    most = [min(5 * -(-keep // 64), n, t) for n, t in zip(size, taken)]
    while sum(most) < keep:
        most = [min(m + 1, n) for m, n in zip(most, size)]
    least, ends, total = [min(1, n) for n in size], [0], 0
    rest = max(0, keep - sum(least))
    for t in taken:
        total += t
        ends.append(round(Fraction(total * rest, sum(taken))))
    out = [min(a + stop - start, m) for a, start, stop, m in zip(least, ends, ends[1:], most)]
    for g in sorted(range(len(size)), key=lambda g: -taken[g]):
        out[g] += min(most[g] - out[g], keep - sum(out))
    return out
