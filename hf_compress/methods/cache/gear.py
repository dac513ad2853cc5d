"""GEAR: low-bit codes, a low-rank part of their error, and sparse outliers (arXiv:2403.05527)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from hf_compress.methods.base import CacheMethod, check_choice, check_count, check_number, head_size
from hf_compress.registry import register
from hf_compress.stores.sparse import CorrectedStore
from hf_compress.tensors.pack import BITS, bits_per_element, divisor

STEP = Fraction(1, 200)  # outliers that `ratio` chooses, in steps of half a percent


@register("gear", stage="cache", kind="low bits", paper="arXiv:2403.05527")
@dataclass
class Gear(CacheMethod):
    """Store all entries in a few bits and correct the largest errors; nothing is evicted.

    The outermost numbers of every channel (keys) or token (values) are kept as they are, and their mean takes their
    place before the rest is quantised; of what the codes miss then, a part of low rank is stored for every head, found
    by power iteration. The prompt is packed as a whole, then every `gap` tokens become a block of their own, with less
    rank. Outliers are written last, so that they are exact (in the formula of the paper the low-rank part is added to
    them).

    With s = `outliers` and rank r a number takes bits + 32 / group + 32 s + 16 r (L + d) / (L d) bits. `ratio` (against
    16 bits) chooses 2 bits from 0.7 on, else 4; then the rank, up to `rank`, then outliers in steps of 0.5 %, for
    prompts that are long against a head.

    Source: "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM",
    arXiv:2403.05527. Cost: a sort of every number and three thin products per layer, 7 to 10 % of a prefill on a CPU
    core (2048 tokens, ratio .5; narrow layers and those of LLaMA-7B); all is unpacked at every step.

    Args:
        bits, outliers: where `ratio` is not given; outliers=0 is GEAR-L.
        group: numbers that share step and minimum: tokens of a channel (keys), channels of a token (values).
        rank: of the prompt's error.
        later_rank: of the error of a block.
        rounds: of the power iteration.
        gap: tokens of a block.
        backbone: "kivi" (groups), or "kcvt": all tokens of a channel, all channels of a token share step and minimum.
    """

    bits: int = 2
    outliers: float = 0.02
    group: int = 64
    rank: int = 4
    later_rank: int = 2
    rounds: int = 3
    gap: int = 64
    backbone: str = "kivi"

    example = {"group": 4, "gap": 4, "rank": 1, "later_rank": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bits", self.bits, BITS)
        check_choice("backbone", self.backbone, ("kivi", "kcvt"))
        check_count("group", self.group, least=4, most=2**16)
        for name in ("rank", "later_rank"):
            check_count(name, getattr(self, name), least=0)
        for name in ("rounds", "gap"):
            check_count(name, getattr(self, name))
        check_number("outliers", self.outliers, 0, 1)
        self._ratio: Fraction | None = None
        self._size = self.group

    def prepare(self, model: nn.Module, ratio: Fraction | None) -> None:
        self._size = head_size(model)

    def check(self, layers: int, ratio: Fraction | None) -> None:
        self._ratio = ratio
        most = 1 - self._backbone(2, self._size) / 16
        if ratio and ratio > most:
            raise ValueError(
                f"ratio={float(ratio):.4g}: codes of 2 bits remove {most:.4g} of the bytes at most; choose a ratio up "
                "to that, a larger group, or another method"
            )

    def packing(self) -> CorrectedStore:
        group = None if self.backbone == "kcvt" else self.group
        return CorrectedStore(self.gap, self._plan, group, self.later_rank, self.rounds)

    def _backbone(self, bits: int, size: int) -> float:
        """Bits per number of the codes alone, for long prompts."""
        return bits if self.backbone == "kcvt" else bits_per_element(bits, divisor(size, self.group))

    def _plan(self, size: int) -> tuple[int, int, Fraction]:
        """Bits, rank and share of outliers, for heads of a size."""
        if not self._ratio:
            return self.bits, self.rank, Fraction(self.outliers).limit_denominator(10**6)
        target = 16 * (1 - self._ratio)
        bits = 4 if self._ratio < Fraction(7, 10) and target >= self._backbone(4, size) else 2
        left = max(target - Fraction(self._backbone(bits, size)), Fraction(0))
        rank = min(self.rank, int(left * size / 16))
        return bits, rank, min((left - Fraction(16 * rank, size)) / 32 // STEP * STEP, Fraction(1))
