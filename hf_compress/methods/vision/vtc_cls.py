"""VTC-CLS: the attention of [CLS], gathered over several blocks."""

from __future__ import annotations

from dataclasses import dataclass

from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.select import identity, top_sorted

__all__ = ["VtcCls"]


@register("vtc_cls", stage="vision", kind="saliency", paper="arXiv:2412.05819", needs={"visual", "cls"})
@dataclass
class VtcCls(VisionMethod):
    """The K tokens that [CLS] attends to most, summed over the last blocks.

    Head-mean softmax rows of [CLS], (n, N) each, are added over `layers` blocks that end with the one whose
    features the projector reads; the K highest are kept in raster order. Cost `layers` times that of one row.

    Source: "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv:2412.05819. The
    code takes the first block as a script argument and names no best one; four blocks are our default. It
    handles one image of 576 tokens; here every crop and frame gets its own K, and encoders without [CLS] add
    their surrogate rows.

    Args:
        layers: number of blocks, counted back from the feature block.

    Raises:
        ValueError: `layers` is not an integer of at least 1, or `positions` is none of its values.
    """

    layers: int = 4

    example = {"ratio": 0.5, "layers": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("layers", self.layers)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", back, "attention") for back in range(self.layers)}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K) of the highest summed attention; ties go to the lower index."""
        if keep == tokens.count:
            return Assignment(identity(len(tokens), keep, tokens.device))
        score = tokens.attention(surrogate="all").mean(1)
        for back in range(1, self.layers):
            score = score + tokens.attention(back, surrogate="all").mean(1)
        return Assignment(top_sorted(score, keep))
