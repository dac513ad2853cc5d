"""FastVID: scenes of a video keep what is salient in each frame, and a few dense tokens that absorb the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.budget import check_share, shares
from hf_compress.methods.base import VisionMethod, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.cluster import density_peaks
from hf_compress.tensors.frames import scenes, transitions
from hf_compress.tensors.merge import nearest, rank
from hf_compress.tensors.select import identity, top_by_part

__all__ = ["FastVID"]

NEIGHBOURS = 4  # of a token, over which its density is taken


@register("fastvid", stage="vision", kind="video", paper="arXiv:2503.11187", needs={"visual", "video", "cls"})
@dataclass
class FastVID(VisionMethod):
    """Salient tokens of every frame, and dense ones that absorb what is left of their scene.

    On the embeddings (n, T * N, D) of a whole video: 1. It is cut into scenes where the cosine of the means of two
    frames is below `threshold`, and at the lowest ones until there are `least` scenes. 2. The K tokens are shared
    evenly over the frames; of its r a frame keeps those r - floor(r * context) that the tower attends to most. 3. What
    a scene has left goes to its anchor frames, every `step`-th counted backwards from its last one: of the tokens that
    are not salient those of the highest density * reach (`density_peaks`, 4 neighbours). 4. For each anchor frame all
    tokens of the scene that are not salient go to its most similar anchor a (cosine), which becomes w * a + (1 - w) *
    the mean of the m tokens that went there, itself among them, w = max(1 / (m + 1), `own`). In the order of time; an
    anchor stands where it stood. `ratio` is the fraction of the whole video. Cost O(N^2 * D) per anchor frame, the
    similarities of its anchors to the scene, and a dense matrix of K * T * N numbers per video.

    An image is a scene of one frame: its salient tokens, and dense ones that absorb the others.

    Source: "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", arXiv:2503.11187, with the defaults
    of its code for LLaVA-OneVision. There a frame is the pooled output of the tower, here the mean of its tokens, as
    the authors have it for Qwen2-VL; attention is that of [CLS], or what tokens receive where there is none. The code
    rounds the counts of anchors down and breaks ties by noise; here they are exact, the lower index wins, and what
    anchor frames cannot hold goes to the salient tokens of the others. Its rule for Qwen2.5-VL, by which frames that
    are all but equal count as one, is not there. The authors keep the positions of the whole prompt:
    `positions="original"`.

    Args:
        least: scenes of a video, at least, as far as it has frames.
        threshold: cosine of two frames below which a scene ends.
        context: share of the tokens that absorb others.
        step: frames from one anchor frame of a scene to the next.
        own: what an anchor has of itself, at least.

    Raises:
        ValueError: `least` or `step` is not an integer of at least 1, `threshold` not a number from -1 to 1, `context`
            not one of [0, 1), `own` not one from 0 to 1.
    """

    least: int = 8
    threshold: float = 0.9
    context: float = 0.4
    step: int = 4
    own: float = 0.6

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("least", self.least)
        check_number("threshold", self.threshold, -1, 1)
        check_share(self.context, "context")
        check_count("step", self.step)
        check_number("own", self.own, 0, 1)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Kept tokens (n, K) and a dense matrix (n, K, T * N) whose rows sum to one."""
        n, V, frames = len(tokens), tokens.count, len(tokens.grids)
        if keep == V:
            return Assignment(identity(n, V, tokens.device))
        x, score = tokens.embeddings.detach().float(), tokens.attention(surrogate="all").mean(1)
        cuts = scenes(transitions(x.unflatten(1, (frames, -1))), self.threshold, self.least).tolist()
        lengths = [[len(list(scene)) for _, scene in groupby(mine)] for mine in cuts]
        counts = [plan(mine, V // frames, keep, check_share(self.context, "context"), self.step) for mine in lengths]
        frame = torch.arange(frames, device=x.device).repeat_interleave(V // frames).expand(n, -1)
        salient = top_by_part(score, frame, torch.tensor([most for most, _ in counts], device=x.device))
        answers = [self.absorbed(x[i], salient[i], lengths[i], counts[i][1]) for i in range(n)]
        kept, dense = zip(*answers)
        return Assignment(torch.stack(kept), dense=torch.stack(dense))

    def absorbed(
        self, x: Tensor, salient: Tensor, lengths: Sequence[int], anchors: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Kept tokens (K,) of one video (V, D) and their matrix (K, V), of so many anchors per frame."""
        V, N, start = len(x), len(x) // len(anchors), 0
        stays, found = salient.clone(), []
        for length in lengths:
            loose = start * N + (~salient[start * N : (start + length) * N]).nonzero()[:, 0]
            for f in range(start, start + length):
                if anchors[f]:
                    mine = ((loose >= f * N) & (loose < (f + 1) * N)).nonzero()[:, 0]
                    peaks = mine[density_peaks(x[loose[mine]][None], anchors[f], NEIGHBOURS)[0][0]]
                    stays[loose[peaks]] = True
                    found.append((loose, peaks))
            start += length
        kept = stays.nonzero()[:, 0]
        place = rank(kept[None], V)[1][0]
        dense = torch.zeros(len(kept), V, device=x.device)
        dense[place[kept], kept] = 1.0
        for loose, peaks in found:
            every = torch.ones(1, len(loose), len(peaks), dtype=torch.bool, device=x.device)
            goes = nearest(x[loose][None], peaks[None], every)[0]  # an anchor goes to itself
            size = torch.zeros(len(peaks), device=x.device).index_add(0, goes, torch.ones(len(loose), device=x.device))
            own = (1 / (size + 1)).clamp(min=self.own)
            dense[place[loose[peaks]], loose[peaks]] = own
            dense[place[loose[peaks[goes]]], loose] += ((1 - own) / size)[goes]
        return kept, dense


def plan(lengths: Sequence[int], tokens: int, keep: int, context: Fraction, step: int) -> tuple[list[int], list[int]]:
    """How many salient tokens and how many anchors each frame keeps, `keep` together, of scenes of such lengths."""
    frames = sum(lengths)
    each = shares(keep, [1.0] * frames, [tokens] * frames)
    salient, anchors, start = [n - int(n * context) for n in each], [0] * frames, 0
    for length in lengths:
        mine = range(start, start + length)
        at = [f for f in mine if (mine[-1] - f) % step == 0]
        room, left = [tokens - salient[f] for f in at], sum(each[f] - salient[f] for f in mine)
        for f, count in zip(at, shares(min(left, sum(room)), [1.0] * len(at), room)):
            anchors[f] = count
        over = left - min(left, sum(room))  # what the anchor frames do not hold
        others = [f for f in mine if f not in at]
        for f, count in zip(others, shares(over, [1.0] * len(others), [tokens - salient[f] for f in others])):
            salient[f] += count
        start += length
    return salient, anchors
