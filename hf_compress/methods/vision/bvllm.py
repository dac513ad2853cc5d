"""B-VLLM without its trained selector: frames that are alike become one, all share the tokens evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.budget import shares
from hf_compress.methods.base import VisionMethod, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.merge import by_owner, first_members, matched
from hf_compress.tensors.select import identity, spaced

__all__ = ["BVLLM"]


@register("bvllm", stage="vision", kind="video", paper="arXiv:2412.09919", needs={"visual", "video"})
@dataclass
class BVLLM(VisionMethod):
    """Some frames, those that are alike merged into one, and each of what is left merged to its share of the tokens.

    On the embeddings (n, T * N, D) of a video of T frames of N tokens: 1. `frames` evenly spaced ones are taken, the
    others are gone. 2. Each is compared with the earlier ones, by s = (cosine + 1) / 2 of their means less the mean of
    all that were taken, and merges with the most similar one where s > `threshold`; those that are linked become the
    mean of their frames, cell by cell. 3. The K tokens are shared evenly over what is left, and each gets down to its
    share by bipartite matching (as in `tome`, again and again), outputs in the slots of their first tokens. Where K
    tokens do not fit into the frames, more are taken, or the weakest links left out. `ratio` is the fraction of the
    whole video. Cost O(T * N^2 * D).

    An image is one frame, merged to K tokens.

    On clips of the built-in video model it is at or below `random` tokens: 75, 63 and 51 % right with 50, 75 and 90 %
    removed, random 81, 67 and 47 (200 questions). All moments and objects are there, but what shows for one moment is
    averaged away: of questions about it 37 % are right at 75 % (random 56), of those about places 92 (93).

    Source: "B-VLLM: A Vision Large Language Model with Balanced Spatio-Temporal Tokens", arXiv:2412.09919
    (zhuqiangLu/B-VLLM), its parts that are not trained. There 16 trained queries read the frames and the question and
    mix 16 frames of them all, and those merge whose mixtures are alike; here evenly spaced frames stand for the
    mixtures, compared by what they show. Plain cosines of frames of one video are all but 1, hence less their mean. The
    code leaves out frames at the end of a chain of links; here a chain is one group. 576 tokens for up to 16 frames are
    36 each there, more than its frames have, so that its last merge never acts.

    Args:
        frames: how many are taken, at most.
        threshold: s above which two frames are alike.

    Raises:
        ValueError: `frames` is no integer of at least 1, or `threshold` no number from 0 to 1.
    """

    frames: int = 16
    threshold: float = 0.75

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("frames", self.frames)
        check_number("threshold", self.threshold, 0, 1)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups (n, T * N) with plain means, -1 of frames that are gone; kept (n, K) the first token of each."""
        n, V, T = len(tokens), tokens.count, len(tokens.grids)
        if keep == V:
            return Assignment(identity(n, V, tokens.device))
        N, least = V // T, -(-keep // (V // T))
        taken = spaced(T, min(T, keep, max(self.frames, least)))
        x = tokens.embeddings.float().unflatten(1, (T, N))[:, taken]
        at = torch.arange(V, device=x.device).view(T, N)[taken]
        owner = torch.full((n, V), -1, device=x.device)
        for mine, own in zip(x, owner):
            group = linked(likeness(mine.mean(1)).tolist(), self.threshold, least)
            count = max(group) + 1
            for k, share in enumerate(shares(keep, [1.0] * count, [N] * count)):
                same = [t for t, g in enumerate(group) if g == k]
                merged = matched(mine[same].mean(0)[None], torch.ones(1, N, device=x.device), share)[0]
                first = at[same[0]][first_members(merged, share)[0]]
                own[at[same]] = first[merged[0]].expand(len(same), -1)
        groups, kept = by_owner(owner)
        return Assignment(kept, groups)


def likeness(frame: Tensor) -> Tensor:
    """(F, D) to (F, F): (cosine + 1) / 2 of frames less their mean; 1 where two are equal."""
    centred = F.normalize(frame - frame.mean(0), dim=-1)
    equal = (frame[:, None] == frame).all(-1)
    return torch.where(equal, 1.0, (centred @ centred.mT + 1) / 2)


def linked(similarity: Sequence[Sequence[float]], threshold: float, least: int) -> list[int]:
    """The group of each of F rows, numbered from 0 in the order of their first ones.

    A row is linked to the most similar earlier one (ties: the first) if they are above the threshold; the strongest
    links (ties: the earlier row) as long as there are `least` groups.
    """
    best = {i: max(range(i), key=lambda j: row[j]) for i, row in enumerate(similarity) if i}
    strong = sorted((i for i, j in best.items() if similarity[i][j] > threshold), key=lambda i: -similarity[i][best[i]])
    links, out = set(strong[: len(similarity) - least]), [0] * bool(similarity)
    for i, j in best.items():
        out.append(out[j] if i in links else max(out) + 1)
    return out
