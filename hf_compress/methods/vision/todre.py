"""ToDRE: tokens that are unlike each other, which leave once text and image no longer look at each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from hf_compress.methods.base import DecoderMethod, Part, VisionMethod, check_choice, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, DecoderView, Read, Tokens
from hf_compress.tensors.diversity import farthest

__all__ = ["ToDRE", "ToDREExit"]


@register("todre", stage="vision", kind="diversity", paper="arXiv:2505.18757", needs={"visual", "cls", "columns"})
@dataclass
class ToDRE(VisionMethod):
    """The K tokens that are least like each other, from the one on that [CLS] attends to most.

    1. On the embeddings (n, N, D) that the language model reads, of all crops of an image together: the first pick is
    the token of the highest head-mean [CLS] attention, each later one the token with the smallest sum of cosines to the
    picks so far (or the smallest of their maximum); raster order. 2. In the language model what is left of the images
    leaves together where text and image hardly look at each other any more (`ToDREExit`). `ratio` counts the first part
    alone, so that it is what a sample saves at least. Cost O(N^2 * D), and up to two streamed passes over the attention
    of one layer.

    Source: "ToDRE: Visual Token Pruning via Diversity and Task Awareness for Efficient Large Vision-Language Models",
    arXiv:2505.18757; no code is known. The paper takes the first pick from the thumbnail, and finds that a random one
    does almost as well; ours is from all crops. Its first version has the maximum, the second one the sum.

    Args:
        criterion: "sum" or "center" (the maximum).
        exit: whether the second part acts.
        tau, sinks: as of `ToDREExit`.

    Raises:
        ValueError: `criterion` or `exit` is none of its values, `tau` is not a number or `sinks` not an integer of at
            least 0.
    """

    criterion: str = "sum"
    exit: bool = True
    tau: float = 0.1
    sinks: int = 0

    scope: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("criterion", self.criterion, ("sum", "center"))
        check_choice("exit", self.exit, (True, False))
        check_number("tau", self.tau, 0)
        check_count("sinks", self.sinks, least=0)

    def parts(self, layers: int, tokens: int | None, ratio: Fraction | None, keep: int | None) -> Mapping[str, Part]:
        """The selection with all of the budget, and the exit."""
        if not self.exit:
            return {}
        return {"vision": (self, ratio, keep), "decoder": (ToDREExit(tau=self.tau, sinks=self.sinks), ratio, keep)}

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); ties go to the lower index."""
        first = tokens.attention(surrogate="mean").mean(1).argmax(1)
        return Assignment(farthest(tokens.embeddings, keep, first, total=self.criterion == "sum"))


@dataclass
class ToDREExit(DecoderMethod):
    """The second part of `todre`: all visual rows of a sample go on, or none.

    The attention (S, S) of layer floor(7 T / 8) of T, counted from 1, mean over heads, is summed over the text rows of
    the prompt and the visual columns, and divided by all that these rows give; likewise over visual rows and text
    columns. If both shares are below `tau` the visual rows leave, but for those that the answer is predicted from.
    Visual rows see only the text before them, and look at its beginning (an attention sink) whatever it says: `sinks`
    rows at the beginning of a sample can be left out of all sums. One streamed pass over the attention, or two.

    Args:
        tau: threshold of both shares; 0: nothing leaves, above 1: everything does.
        sinks: rows that do not count.
    """

    tau: float = 0.1
    sinks: int = 0

    def boundaries(self, layers: int) -> Sequence[int]:
        return (max(1, 7 * layers // 8),)

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int | None]:
        return dict.fromkeys(self.boundaries(layers))

    def decide(self, view: DecoderView, keep: list[int] | None) -> Assignment | None:
        text, visual = view.prompt & ~view.visual, view.prompt & view.visual
        leaves = self.share(view, text, visual) < self.tau
        if bool(leaves.any()):  # else the other share need not be known
            leaves &= self.share(view, visual, text) < self.tau
        if not bool(leaves.any()):
            return None
        return Assignment.selection(view.valid & ~(view.removable & ~view.speaks & leaves[:, None]))

    def share(self, view: DecoderView, rows: Tensor, columns: Tensor) -> Tensor:
        """(B,) of what the `rows` (B, S) attend to in the layer just run that which lies in the `columns` (B, S)."""
        weight, counts = rows / rows.sum(1, keepdim=True).clamp(min=1), view.first >= self.sinks
        given = view.received(weight[:, None], source="own").mean(1)
        return (given * (columns & counts)).sum(1) / (1 - (given * ~counts).sum(1)).clamp(min=1e-6)
