"""ZipCache: salient tokens in more bits than the others (arXiv:2405.14256)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.methods.base import CacheMethod, check_choice, check_count, check_number
from hf_compress.methods.holding import Holding
from hf_compress.registry import register
from hf_compress.signals import QUERIES, CacheView, Read
from hf_compress.stores.body import Store
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.mixed import Blocks, Joined, Mixed, choose, highest
from hf_compress.stores.packed import Packed
from hf_compress.tensors.kvmerge import take
from hf_compress.tensors.pack import BITS


@register("zipcache", stage="cache", paper="arXiv:2405.14256", needs={"columns"})
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

    Source: ZipCache, NeurIPS 2024, arXiv:2405.14256. Cost: `probes` of a second pass over the attention of the prompt.

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

    continues = False

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

    def packing(self) -> Store:
        return self

    @property
    def bits(self) -> float:
        """Mean bits per number."""
        if self._ratio:
            return float(16 * (1 - self._ratio))
        return self.high - self.share * (self.high - self.low)

    def begin(self, view: CacheView) -> Tensor:
        return torch.zeros(*view.shape[:2], 0, device=view.valid.device)  # of what comes: the prompt is packed at once

    def voting_rows(self, tail: int, rows: int) -> list[bool]:
        return [self._probing[i % self.gap] for i in range(tail - rows, tail)]

    def _probe_rows(self, rows: int, layer: int) -> Tensor:
        """(rows,) bool, which of them vote: the newest ones, and as many random ones before them."""
        part = budget.kept(rows, 1 - Fraction(self.probes).limit_denominator(10**6) / 2, floor=True)
        generator = torch.Generator().manual_seed(1000003 * self.seed + layer)
        voting = torch.arange(rows) >= rows - part
        voting[torch.randperm(rows - part, generator=generator)[:part]] = True
        return voting

    def _high_count(self, n: int, heads: int, size: int) -> int:
        """How many of n tokens are stored in `high` bits."""
        if not self._ratio:
            return n - int(Fraction(self.share).limit_denominator(10**6) * n)
        numbers = 2 * heads * size
        scales = 32 * n + 2 * 32 * heads * size + 16 * heads * size  # of values, keys of two kinds, channels of values
        marks = 2 * heads * 8 * -(-n // 8)
        spare = 16 * (1 - self._ratio) * numbers * n - scales - marks - self.low * numbers * n
        return min(max(int(spare / (numbers * (self.high - self.low))), 0), n)

    # -- the store --------------------------------------------------------------------------------------------------
    def settle(self, held: list[HeldLayer], views: Sequence[CacheView] | None) -> None:
        """Pack the prompt; before later forwards, blocks that are complete."""
        for i, layer in enumerate(held):
            if views is not None:
                self._prompt(layer, views[i])
            elif layer.scores is not None and layer.keys.shape[2] >= self.gap:
                self._blocks(layer)

    def _prompt(self, held: HeldLayer, view: CacheView) -> None:
        B, H, n, d = view.keys.shape
        lengths = view.lengths.flatten().tolist()
        voting = torch.zeros(B, n)
        for b, length in enumerate(lengths):
            voting[b, :length] = self._probe_rows(length, view.layer)
        weight = voting.to(view.keys.device).gather(1, view.order[:, 0].clamp(min=0)) * view.valid[:, 0]
        score = view.column_sums(weight=weight, normalize=self.normalize == "paper")
        if self.normalize == "code":
            score = score / (view.lengths - view.order).clamp(min=1)
        counts = [self._high_count(length, H, d) for length in lengths]
        member = highest(score.masked_fill(~view.valid, -torch.inf), score.new_tensor(counts)[:, None, None])
        blocks = [x[:, :, None] for x in (view.keys, view.values, member & view.valid, view.valid)]
        keys, values = self._pack(blocks, (max(counts), n - min(counts)))
        held.pack(Blocks(keys), Blocks(values))

    def _blocks(self, held: HeldLayer) -> None:
        assert held.layout is not None and held.scores is not None and held.body is not None
        (_, H, T, d), S, gap = held.keys.shape, len(held.layout), self.gap
        J = T // gap
        n = J * gap
        votes = torch.tensor(self.voting_rows(T, T), device=held.scores.device).flip(0).cumsum(0).flip(0)
        seen = votes if self.normalize == "paper" else torch.arange(T, 0, -1, device=votes.device)
        count = self._high_count(gap, H, d)
        blocks = [t[:, :, :n].unflatten(2, (J, gap)) for t in (held.keys, held.values, held.scores / seen.clamp(min=1))]
        valid = held.layout.valid[:, None, S - T : S - T + n].unflatten(2, (J, gap))
        member = highest(blocks[2].masked_fill(~valid, -torch.inf), votes.new_tensor([count])) & valid
        keys, values = self._pack([blocks[0], blocks[1], member, valid], (count, gap - count))
        old = held.body
        assert isinstance(old[0], Blocks) and isinstance(old[1], Blocks)
        held.body = old[0].grow(keys, J), old[1].grow(values, J)
        held.keys, held.values = held.keys[:, :, n:].clone(), held.values[:, :, n:].clone()
        held.scores = held.scores[..., n:].clone()

    def _pack(self, blocks: list[Tensor], most: tuple[int, int]) -> tuple[Mixed, Mixed]:
        """Keys and values (B, Hkv, J, n, d), of which `member` (B, Hkv, J, n) are salient; `valid` is (B, 1, J, n).

        `most` salient and other tokens of a head at most.
        """
        keys, values, member, valid = blocks
        top = (values.float().abs() * valid[..., None]).amax(-2, keepdim=True)
        factor = torch.where(top > 0, top, 1.0).sqrt().clamp(min=1e-4).to(torch.float16)
        values = values.float() / factor.float()
        high, low = choose(member, most[0], valid), choose(~member, most[1], valid)
        k = [Packed.of(take(keys, at), b, (max(1, at.shape[-1]), 1)) for at, b in ((high, self.high), (low, self.low))]
        v = [Joined.over(take(values, at), b) for at, b in ((high, self.high), (low, self.low))]
        return Mixed.of(member, k[0], k[1]), Mixed.of(member, v[0], v[1], factor)
