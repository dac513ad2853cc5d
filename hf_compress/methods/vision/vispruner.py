"""VisPruner: important tokens, and of the others those that do not repeat each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_compress.budget import check_share
from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.diversity import unrepeated

__all__ = ["VisPruner", "select"]


@register("vispruner", stage="vision", kind="diversity", paper="arXiv:2412.01818", needs={"visual", "cls"})
@dataclass
class VisPruner(VisionMethod):
    """The tokens that [CLS] attends to most, and the least repetitive ones of the others.

    1. int(K * important) tokens of the highest head-mean [CLS] attention (n, N) stay. 2. The others, in the order of
    their attention, lose repetitions round by round until the rest of the K is left: every token at an even place looks
    for its nearest one at an odd place, by cosine of the features (n, N, D) that the projector reads, and those that
    are nearest go, `step` of them (see `unrepeated`). Raster order; every crop and frame picks its own K. Cost
    O(N^2 * D) for the cosines, and at most 72 rounds of N^2 / 4.

    Source: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
    arXiv:2412.01818 (its first version is `fastervlm`). Paper and code agree. Where an image has more than 576 tokens
    more go in a round, in proportion, so that the cost does not grow with N^3; where only a few are left the code fails
    and here all even places go. Encoders without [CLS] take the attention received, and where patches are joined into
    one token their features are compared together.

    Args:
        important: share of the K tokens that the attention decides.
        step: how many tokens go in a round, of up to 576.

    Raises:
        ValueError: `important` is not a number in [0, 1), `step` is not an integer of at least 1.
    """

    important: float = 0.5
    step: int = 8

    example = {"ratio": 0.5, "step": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.important, "important")
        check_count("step", self.step)

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); ties go to the lower index."""
        attention = tokens.attention(surrogate="all").mean(1)
        important = int(keep * check_share(self.important, "important"))
        return Assignment(select(attention, tokens.features, [important] * len(tokens), keep, self.step))


def select(attention: Tensor, x: Tensor, important: Sequence[int], keep: int, step: int) -> Tensor:
    """(n, keep) ascending tokens: of each image so many `important` ones, fewer than all, and its least repetitive.

    Args:
        attention: (n, N); x: (n, N, D), what repetitions are told by; step: as of `VisPruner`.
    """
    order = attention.argsort(dim=1, descending=True, stable=True)
    kept, step = order[:, :keep].clone(), max(step, step * order.shape[1] // 576)
    for count in set(important):
        images = [i for i, mine in enumerate(important) if mine == count]
        kept[images, count:] = unrepeated(x[images], order[images, count:], keep - count, step)
    return kept.sort(dim=1).values
