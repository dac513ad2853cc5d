"""MiKV: entries are demoted to few bits where others evict them (arXiv:2402.18096)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor, nn

from hf_compress.methods.base import CacheMethod, check_choice, check_count, check_number, head_size
from hf_compress.methods.holding import Holding
from hf_compress.registry import register
from hf_compress.signals import COLUMNS, CacheView, Read
from hf_compress.stores.demoting import DemotingStore
from hf_compress.tensors.pack import BITS, divisor


@register("mikv", stage="cache", kind="low bits", paper="arXiv:2402.18096", needs={"columns"})
@dataclass
class MiKV(Holding, CacheMethod):
    """Important entries as they are (or in `high` bits), all others in `low` bits; nothing is evicted.

    Of S entries floor(r S) of every head are important: half of them the newest, half those of the largest accumulated
    attention (H2O). Codes are per token, in groups of channels. Before that keys are multiplied, channel by channel, by
    the balancer sqrt(max |query| / max |key|) of the prompt, which takes outliers away, and divided by it again when
    they are read (the paper divides the queries; the products are the same). While decoding every new entry is
    important at first, and the lowest that is not recent is demoted in exchange; none comes back.

    r follows from `ratio` (against 16 bits per number): r e_high + (1 - r) e_low = 16 (1 - ratio), with e = bits + 32 /
    group, or 16. Which entries are important costs one bit per entry and head for keys and for values (the paper: an
    index each). The running score, four bytes per entry and head, is not counted.

    Source: "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization",
    arXiv:2402.18096; there is no released code. Cost: that of H2O (with its packing 3 % of a prefill of LLaMA-7B layers
    at 2048 tokens on a CPU core, 6 % of narrow ones), and one small quantisation per step.

    Args:
        policy: "hold" demotes while decoding, "grow" packs the prompt only.
        share: r, where `ratio` is not given.
        high: 16 (as they are), or 8, 4, 2.
        low: 1, 2, 4 or 8, fewer than `high`.
        group: numbers that share step and minimum (64: half of a head of 128, as in the paper), or the largest divisor
            of the head size below.
    """

    policy: str = "hold"
    share: float = 0.2
    high: int = 16
    low: int = 2
    group: int = 64

    example = {"group": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("high", self.high, (16, 8, 4, 2))
        check_choice("low", self.low, BITS)
        check_count("group", self.group, least=4)
        check_number("share", self.share, 0, 1)
        if self.low > self.high:
            raise ValueError(f"low={self.low} must not be more than high={self.high}")
        self._ratio: Fraction | None = None
        self._size = self.group

    def reads(self, depth: int) -> set[Read]:
        return {COLUMNS}

    def prepare(self, model: nn.Module, ratio: Fraction | None) -> None:
        self._size = head_size(model)

    def check(self, layers: int, ratio: Fraction | None) -> None:
        self._ratio = ratio
        least, most = (1 - b / 16 for b in self.packing().widths(self._size))
        if ratio and not least <= ratio <= most:
            raise ValueError(
                f"ratio={float(ratio):.4g}: entries of {self.high} and {self.low} bits in groups of "
                f"{divisor(self._size, self.group)} "
                f"remove {float(least):.4g} to {float(most):.4g} of the bytes; choose a ratio between, or other bits"
            )

    def begin(self, view: CacheView) -> Tensor:
        return view.column_sums()

    def packing(self) -> DemotingStore:
        share = Fraction(self.share).limit_denominator(10**6)
        return DemotingStore(
            self.high, self.low, self.group, share, self._ratio, demotes=self.policy == "hold", size=self._size
        )
