"""GlobalCom2: the whole image in small commands how much each of its crops keeps, and helps to pick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.budget import shares
from hf_compress.methods.base import VisionMethod, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.regions import Box, region_sums
from hf_compress.tensors.select import top_by_part, top_sorted

__all__ = ["GlobalCom2"]


@register("globalcom2", stage="vision", kind="crops", paper="arXiv:2501.05179", needs={"visual", "cls", "places"})
@dataclass
class GlobalCom2(VisionMethod):
    """Crops keep more where the thumbnail looks, and there their tokens count more.

    On the head-mean logits (n, N) with which [CLS] looks at the tokens of all crops of an image, thumbnail first: 1.
    the thumbnail keeps its proportional share s of the budget. 2. e_j is the sum of its logits over the region of crop
    j, which gets N_j * min(1, s * (1 + p_j - mean p)) tokens, p = softmax(e / temperature). 3. The logits of the
    thumbnail are resized (bilinear) to the canvas of the crops; a token scores c / |c| + g / |g|, c and g being the
    logits of its crop and what is resized over it. 4. The highest stay. An image of one crop, and every frame, keeps
    its highest logits. Cost: one row of logits per crop, O(N * d) each; no map.

    Source: "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
    Vision-Language Models", arXiv:2501.05179. Its code reads the last block, ours the one whose features the projector
    reads; it rounds each count down, ours are exact by largest remainders; it lays the regions over a canvas with
    padding, ours over the image, which is what the thumbnail shows; its thumbnail comes in the order of the scores,
    ours in that of the raster; its loop is right for one image at a time. Encoders without [CLS] take the logarithm of
    the attention received, which neither paper nor code covers.

    Args:
        temperature: the larger, the more alike the counts of the crops.

    Raises:
        ValueError: `temperature` is not a number above 0, or `positions` is none of its values.
    """

    temperature: float = 10.0

    scope: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, 0, above=True)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K) of the highest scores by crop; ties go to the lower index."""
        logits = tokens.attention(surrogate="all", logits=True).mean(1)
        if len(tokens.grids) == 1:
            return Assignment(top_sorted(logits, keep))
        (whole, *grids), (_, *boxes) = tokens.grids, tokens.boxes
        thumbnail, *crops = logits.split([h * w for h, w in tokens.grids], dim=1)
        view, scores = thumbnail.unflatten(1, whole), [thumbnail]
        for crop, grid, box in zip(crops, grids, boxes):
            scores.append(F.normalize(crop) + F.normalize(over(view, grid, box).flatten(1)))
        counts = torch.tensor(self.counts(view, grids, boxes, keep), device=logits.device)
        return Assignment.selection(top_by_part(torch.cat(scores, 1), tokens.place[..., 0], counts))

    def counts(
        self, view: Tensor, grids: Sequence[tuple[int, int]], boxes: Sequence[Box], keep: int
    ) -> list[list[int]]:
        """How many tokens of the thumbnail (n, h, w), then of every crop stay; they sum to `keep`."""
        sizes = [h * w for h, w in grids]
        parts = [view[0].numel(), sum(sizes)]
        first, rest = shares(keep, parts, parts)
        p = (region_sums(view, boxes) / self.temperature).softmax(1)
        scales = (keep / sum(parts) * (1 + p - p.mean(1, keepdim=True))).clamp(max=1).tolist()
        return [[first, *shares(rest, [n * s for n, s in zip(sizes, mine)], sizes)] for mine in scales]


def over(view: Tensor, grid: tuple[int, int], box: Box) -> Tensor:
    """(n, h, w) of the thumbnail (n, H, W), resized to the canvas of all crops and cut to the crop of this box."""
    (h, w), (top, left, bottom, right) = grid, box
    height, width = round(h / (bottom - top)), round(w / (right - left))
    canvas = F.interpolate(view[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
    y, x = round(top * height), round(left * width)
    return canvas[:, y : y + h, x : x + w]
