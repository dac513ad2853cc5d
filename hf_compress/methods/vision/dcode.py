"""D-CoDe: frames unlike each other, in each the longest tokens, of which near duplicates are merged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.budget import check_share, shares
from hf_compress.methods.base import VisionMethod, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.merge import by_owner
from hf_compress.tensors.select import identity, top_sorted

__all__ = ["DCoDe"]

STEP = 0.05  # by which the cosine of duplicates is lowered until few enough are left


@register("dcode", stage="vision", kind="video", paper="arXiv:2510.08818", needs={"visual", "video", "cls"})
@dataclass
class DCoDe(VisionMethod):
    """Some frames evenly spaced and some unlike them; of each the longest tokens, near duplicates of which become one.

    On a whole video of T frames of N tokens: 1. The share sqrt(K / (T N)) of its frames stays, more where their tokens
    do not hold K: floor(n * `even`) of these n evenly, the others one by one, each the frame with the smallest mean
    cosine to those chosen. A frame is the state of its [CLS] in the last block, or what tokens give by the attention
    that they receive. 2. The K tokens are shared evenly over these frames. Of a frame that gets b the max(b, N / 2)
    tokens of the largest L2 norm are candidates. 3. By falling norm each candidate that is left absorbs those with a
    cosine of `alike` and more, which become one plain mean in its slot; never so many that fewer than b are left, and
    while more than b are left all is done anew with a cosine lower by .05. In the order of time. `ratio` is the
    fraction of the whole video. Cost O(N^2 * D) per frame, and N small steps for each cosine that is tried.

    An image is a video of one frame.

    Source: "D-CoDe: Scaling Image-Pretrained VLMs to Video via Dynamic Compression and Question Decomposition", EMNLP
    2025, arXiv:2510.08818, its compression; the question is not taken apart. It takes 15 of 50 or 18 of 36 frames and
    half of their tokens, and what the duplicates leave; here the count is exact. In its code a token that is like an
    absorbed one vanishes too, though it is not like its absorber; here what is absorbed is like the one that absorbs.

    Args:
        even: share of the frames that is evenly spaced.
        alike: cosine from which on tokens are duplicates.

    Raises:
        ValueError: `even` is not one of [0, 1), or `alike` not a number from -1 to 1.
    """

    even: float = 0.85
    alike: float = 0.8

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.even, "even")
        check_number("alike", self.alike, -1, 1)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention"), Read("tower", 0, "hidden")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups (n, T * N) with plain means, kept (n, K): the token that absorbed the others of its group."""
        n, V, frames = len(tokens), tokens.count, len(tokens.grids)
        if keep == V:
            return Assignment(identity(n, V, tokens.device))
        N = V // frames
        x = tokens.embeddings.detach().float().unflatten(1, (frames, N))
        some = max(-(-keep // N), min(frames, keep, round(frames * math.sqrt(keep / V))))
        evenly = int(some * check_share(self.even, "even"))
        owner = torch.full((n, frames, N), -1, device=x.device)
        for i, vectors in enumerate(tokens.whole("hidden").float()):
            chosen = unlike(vectors, some, max(1, evenly))
            for t, count in zip(chosen, shares(keep, [1.0] * some, [N] * some)):
                owner[i, t] = self.merged(x[i, t], count)
                owner[i, t] += torch.where(owner[i, t] < 0, 0, t * N)
        groups, kept = by_owner(owner.flatten(1))
        return Assignment(kept, groups)

    def merged(self, x: Tensor, count: int) -> Tensor:
        """Of each token of a frame (N, D) the one whose slot it goes to, -1 for none; `count` slots."""
        norm, out = x.norm(dim=-1), torch.full((len(x),), -1, device=x.device)
        some = top_sorted(norm[None], max(count, len(x) // 2))[0]
        some = some[norm[some].argsort(descending=True, stable=True)]
        unit, threshold = F.normalize(x[some], dim=-1), self.alike
        similar = (unit @ unit.T).nan_to_num(-1).cpu()  # of states that have overflown: else nothing ever is alike
        while True:
            goes = absorbed(similar, threshold, count)
            if len(goes.unique()) == count:
                out[some] = some[goes.to(x.device)]
                return out
            threshold -= STEP


def unlike(x: Tensor, count: int, evenly: int) -> list[int]:
    """`count` of T frames (T, D), ascending: `evenly` of them evenly spaced, the others unlike those chosen before."""
    unit = F.normalize(x, dim=-1)
    chosen = [t * (len(x) - 1) // max(1, evenly - 1) for t in range(evenly)]
    while len(chosen) < count:
        mean = (unit @ unit[chosen].T).mean(1)
        mean[chosen] = torch.inf
        chosen.append(int(mean.argmin()))
    return sorted(chosen)


def absorbed(similar: Tensor, threshold: float, least: int) -> Tensor:
    """(m,): which of m tokens, the most important first, each goes into; at least `least` stay.

    Args:
        similar: (m, m) cosines; of those that one may absorb the most similar go first.
    """
    m = len(similar)
    goes, free, spare = torch.arange(m), torch.ones(m, dtype=torch.bool), m - least
    for i in range(m):
        if not spare:
            break
        if free[i]:
            like = (free & (similar[i] >= threshold)).nonzero()[:, 0]
            like = like[like > i]
            like = like[similar[i, like].argsort(descending=True, stable=True)[:spare]]
            goes[like], free[like] = i, False
            spare -= len(like)
    return goes
