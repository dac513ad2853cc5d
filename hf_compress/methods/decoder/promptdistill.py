"""PromptDistill: what the last row's queries point at goes on, text or not (arXiv:2503.23274)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from hf_compress.methods.base import check_choice, check_count
from hf_compress.methods.decoder.pyramiddrop import PyramidDrop
from hf_compress.registry import register
from hf_compress.signals import DecoderView


@register("promptdistill", stage="decoder", kind="prompt", paper="arXiv:2503.23274")
@dataclass
class PromptDistill(PyramidDrop):
    """Rows of the prompt, text too, leave after a few layers: those stay that the last row's queries point at.

    In the layer just run z is the product of the query of the last prompt row with every key, mean over heads, no
    softmax; 0 on the `keep_last` last rows; then the mean over `pool` rows of those alive, zeros at the ends. The rows
    with the highest z stay, and the `keep_last` last ones. Of N that may go floor(N shrink^s) are left behind the s-th
    of `layers`, `shrink` such that the mean over layers meets `ratio`. Positions are kept.

    The release names the rows that stay (1024) and not their share, and counts from the layer behind which it cuts.

    On the built-in recall model (100 questions, cut before layer 2 of 4) 64 and 21 % are right with 25 and 40 % removed
    (random rows: 42 and 11): what goes there before layer 2 goes for good, and four layers leave little to look with.

    Source: PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient Large Language
    Model Inference, arXiv:2503.23274. Cost: one row per cut.

    Args:
        layers: the first short layer, or several, ascending; default 14 of 32, in proportion.
        keep_last: rows at the end of the prompt that stay.
        pool: rows that are averaged, odd.
        candidates: "prompt", or "visual" (only visual tokens may go).
        truncate: rows that go leave the caches of the layers run before, too, not their work.

    Raises:
        ValueError: a knob is none of its values, or the ratio is out of reach of these cuts.
    """

    keep_last: int = 1
    pool: int = 5
    candidates: str = "prompt"
    truncate: bool = False

    source: ClassVar[str] = "own"
    least: ClassVar[int] = 0  # the last rows are there in any case
    example = {"ratio": 0.4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("keep_last", self.keep_last)
        check_count("pool", self.pool)
        check_choice("candidates", self.candidates, ("prompt", "visual"))
        check_choice("truncate", self.truncate, (True, False))
        if self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd, so that pooling is centred")
        if self.scope == "per_image" and self.candidates == "prompt":
            raise ValueError("scope='per_image' shares a budget over images; it takes candidates='visual'")

    @property
    def trims(self) -> bool:  # type: ignore[override]
        return self.truncate

    def boundaries(self, layers: int) -> Sequence[int]:
        if self.layers is None:
            return (max(1, round(Fraction(14 * layers, 32))),)
        return super().boundaries(layers)

    def removable(self, view: DecoderView) -> Tensor:
        rows = view.prompt & (view.last >= self.keep_last) & ~view.speaks
        return rows & view.visual if self.candidates == "visual" else rows

    def units(self, images: int) -> int:
        return images if self.candidates == "visual" else 1

    def score(self, view: DecoderView) -> Tensor:
        z = view.attention(source=self.source, softmax=False)
        z = z.masked_fill(~(view.prompt & (view.last >= self.keep_last)), 0)
        return F.avg_pool1d(z[:, None], self.pool, stride=1, padding=self.pool // 2)[:, 0]
