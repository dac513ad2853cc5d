"""DAMRO: the few tokens that [CLS] attends to most are outliers: decode against them, or drop them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_compress.methods.base import PixelMethod, TowerMethod, VisionMethod, check_choice, check_count
from hf_compress.registry import get, register
from hf_compress.signals import Assignment, Read, SomeTokens, Tokens
from hf_compress.tensors.select import identity, top_sorted

__all__ = ["Damro"]


@register("damro", stage="vision", kind="saliency", paper="arXiv:2410.04514", needs={"visual", "cls"})
@dataclass
class Damro(VisionMethod):
    """The tokens that [CLS] attends to most, as what to decode against; or another method without them.

    On the logits (n, H, N) with which [CLS] looks at the tokens in the block whose features the projector reads, summed
    over the heads (those of queries and keys at full width, but for a factor): with `outliers="keep"` the K highest
    stay. That is no compression to answer from but the negative of the paper: `model.compress("damro", keep=10)`, then
    `with model.compression.contrasting(alpha=2, beta=0.1): model.generate(...)`. With `outliers="drop"` the `count`
    highest of every crop and frame vanish, and the method called `then` picks K of the others, by signals that are what
    they were; where K leaves less than `count` to drop, so many. Cost: one row of logits, O(N * D), and `then`.

    Source: "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination", arXiv:2410.04514. Paper
    and code decode so; to drop the outliers in front of a selector is ours. They need [CLS]; towers without it take the
    logits of their mean query here, of which the paper says nothing. The highest are outliers in towers that keep notes
    in a few background tokens. The small embedded LLaVA keeps none, there they are objects: without them `fastervlm`
    answers 84 of 100 questions with half of the tokens (random ones 94), and against them 47 of 48 are answered (48
    without contrast).

    Args:
        outliers: "keep" or "drop".
        count: how many there are in a crop; of "drop".
        then: the vision method that picks among the others, with the knobs that it has by default; of "drop".

    Raises:
        ValueError: a knob is none of its values; `then` is no vision method, or one that acts on pixels, in the tower,
            on several crops together or trains a module; on call, that it reads a grid.
    """

    outliers: str = "keep"
    count: int = 10
    then: str = "fastervlm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("outliers", self.outliers, ("keep", "drop"))
        check_count("count", self.count)
        other: Any = get(self.then, "then").cls
        plain = issubclass(other, VisionMethod) and not issubclass(other, (Damro, PixelMethod, TowerMethod))
        if not plain or other.scope != "crop" or other.make is not VisionMethod.make:
            raise ValueError(f"then={self.then!r} is no vision method that picks among the tokens of a crop")

    @cached_property
    def other(self) -> VisionMethod:
        """The method that picks among what is no outlier."""
        return get(self.then).cls(positions=self.positions)

    def reads(self, depth: int) -> set[Read]:
        own = {Read("tower", 0, "attention")}
        return own if self.outliers == "keep" else own | self.other.reads(depth)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K), or what `then` answers; ties go to the lower index."""
        if keep == tokens.count:
            return Assignment(identity(len(tokens), keep, tokens.device))
        logits = tokens.attention(surrogate="mean", logits=True).sum(1)
        if self.outliers == "keep":
            return Assignment(top_sorted(logits, keep))
        few = SomeTokens(tokens, top_sorted(-logits, max(keep, tokens.count - self.count)))
        return few.among_all(self.other.assign(few, keep))
