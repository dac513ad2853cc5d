"""ZipCache: salient tokens in more bits than the others (arXiv:2405.14256)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.methods.base import CacheMethod, check_choice, check_count, check_number
from hf_compress.methods.holding import Holding
from hf_compress.registry import register
from hf_compress.signals import QUERIES, CacheView, Read
from hf_compress.stores.salient import SalientStore
from hf_compress.tensors.pack import BITS


@register("zipcache", stage="cache", kind="low bits", paper="arXiv:2405.14256", needs={"columns"})
@dataclass
class ZipCache(Holding, CacheMethod):
    """Every head stores its salient tokens in `high` bits and the others in `low` bits; nothing is evicted.

    A token is salient if the probe rows that see it attend to it much: column sums of their attention, divided by the
    number of probe rows that see the token (the released code divides by the number of all rows that do, which is
    another order). Keys are quantised per channel, with one step and minimum for all tokens of a kind; values are
    divided by sqrt(max |v|) of their channel and quantised per token, over the channels of all heads.

    While decoding every `gap` tokens become a block of their own (the released code quantises the whole cache again,
    and errors add up), and a tenth of its rows probe it. The probe rows of the prompt are the same at every run, other
    ones in every layer; in all blocks they are the same.

    The share of `low` tokens follows from `ratio` (against 16 bits per number) and the length of each sample, with
    everything that is stored beside the codes counted; a prompt too short for it has only `low` tokens.

    Source: "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification", NeurIPS 2024,
    arXiv:2405.14256. Cost: `probes` of a second pass over the attention of the prompt.

    Args:
        policy: "hold" packs what is generated too, "grow" the prompt only.
        share: of tokens in `low` bits, where `ratio` is not given.
        high, low: bits, 1, 2, 4 or 8.
        probes: share of rows that vote; half of them are the newest, the others random.
        gap: tokens of a block.
        normalize: "paper", or "code".
        seed: of the random rows.
    """

    policy: str = "hold"
    share: float = 0.4
    high: int = 4
    low: int = 2
    probes: float = 0.1
    gap: int = 100
    normalize: str = "paper"
    seed: int = 0

    example = {"gap": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("high", self.high, BITS)
        check_choice("low", self.low, BITS)
        check_choice("normalize", self.normalize, ("paper", "code"))
        check_count("gap", self.gap)
        check_number("share", self.share, 0, 1)
        check_number("probes", self.probes, 0, 1, above=True)
        check_count("seed", self.seed, least=0)
        if self.low >= self.high:
            raise ValueError(f"low={self.low} must be less than high={self.high}")
        self._ratio: Fraction | None = None
        self._probing: list[bool] = self._probe_rows(self.gap, layer=0).tolist()

    def reads(self, depth: int) -> set[Read]:
        return {QUERIES}

    def check(self, layers: int, ratio: Fraction | None) -> None:
        self._ratio = ratio
        least, most = 1 - self.high / 16, 1 - self.low / 16
        if ratio and not least <= ratio < most:
            raise ValueError(
                f"ratio={float(ratio):.4g}: {self.high} and {self.low} bits remove {least:.4g} to (almost) {most:.4g} "
                "of the bytes; choose a ratio between, or other bits (high=8, low=4; high=2, low=1)"
            )

    def packing(self) -> SalientStore:
        share = None if self._ratio else Fraction(self.share).limit_denominator(10**6)
        gap = self.gap if self.policy == "hold" else 0
        return SalientStore(gap, self.high, self.low, share, self._ratio, self.salience)

    def begin(self, view: CacheView) -> Tensor:
        """(B, Hkv, S): how salient the tokens of the prompt are; what is generated begins with nothing."""
        voting = torch.zeros(len(view.valid), view.shape[2])
        for b, length in enumerate(view.lengths.flatten().tolist()):
            voting[b, :length] = self._probe_rows(length, view.layer)
        weight = voting.to(view.valid.device).gather(1, view.order[:, 0].clamp(min=0)) * view.valid[:, 0]
        score = view.column_sums(weight=weight, normalize=self.normalize == "paper")
        return score / (view.lengths - view.order).clamp(min=1) if self.normalize == "code" else score

    def salience(self, sums: Tensor) -> Tensor:
        """(B, Hkv, T): of the newest tokens, from the attention that they received from the probe rows among them."""
        T = sums.shape[-1]
        votes = torch.tensor(self.voting_rows(T, T), device=sums.device).flip(0).cumsum(0).flip(0)
        seen = votes if self.normalize == "paper" else torch.arange(T, 0, -1, device=sums.device)
        return sums / seen.clamp(min=1)

    def voting_rows(self, tail: int, rows: int) -> list[bool]:
        return [self._probing[i % self.gap] for i in range(tail - rows, tail)]

    def _probe_rows(self, rows: int, layer: int) -> Tensor:
        """(rows,) bool, which of them vote: the newest ones, and as many random ones before them."""
        part = budget.kept(rows, 1 - Fraction(self.probes).limit_denominator(10**6) / 2, floor=True)
        generator = torch.Generator().manual_seed(1000003 * self.seed + layer)
        voting = torch.arange(rows) >= rows - part
        voting[torch.randperm(rows - part, generator=generator)[:part]] = True
        return voting
