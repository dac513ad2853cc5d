"""Salient tokens of every head in more bits than the others, block by block (arXiv:2405.14256)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress.signals import CacheView
from hf_compress.stores.blocks import BlockStore
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.mixed import Joined, Mixed, choose, highest
from hf_compress.stores.packed import Packed, Stored
from hf_compress.tensors.kvmerge import take


@dataclass(frozen=True)
class SalientStore(BlockStore):
    """The tokens of the highest running score in `high` bits and the others in `low` bits.

    Keys are quantised per channel, with one step and minimum for all tokens of a kind; values are divided by
    sqrt(max |v|) of their channel and quantised per token, over the channels of all heads.

    Args:
        high, low: bits.
        share: of tokens in `low` bits, where there is no `ratio`.
        ratio: against 16 bits, with everything that is stored beside the codes counted.
        salience: (B, Hkv, T) running scores of the tail to what its tokens are ranked by.
    """

    high: int
    low: int
    share: Fraction | None
    ratio: Fraction | None
    salience: Callable[[Tensor], Tensor]

    @property
    def bits(self) -> float:
        if self.ratio:
            return float(16 * (1 - self.ratio))
        assert self.share is not None
        return self.high - float(self.share) * (self.high - self.low)

    def prompt(self, view: CacheView) -> tuple[Stored, Stored]:
        (_, H, n, d), valid = view.keys.shape, view.valid
        assert view.scores is not None
        counts = [self._high_count(length, H, d) for length in view.lengths.flatten().tolist()]
        wanted = view.scores.new_tensor(counts)[:, None, None]
        member = highest(view.scores.masked_fill(~valid, -torch.inf), wanted) & valid
        parts = (x[:, :, None] for x in (view.keys, view.values, member, valid))
        return self._mixed(*parts, most=(max(counts), n - min(counts)))

    def block(self, held: HeldLayer, valid: Tensor, cut: Callable[[Tensor], Tensor]) -> tuple[Stored, Stored]:
        (_, H, _, d), valid = held.keys.shape, cut(valid)
        count = self._high_count(self.gap, H, d)
        score = cut(self.salience(held.side["scores"])).masked_fill(~valid, -torch.inf)
        member = highest(score, torch.tensor([count], device=score.device)) & valid
        return self._mixed(cut(held.keys), cut(held.values), member, valid, most=(count, self.gap - count))

    def _high_count(self, n: int, heads: int, size: int) -> int:
        """How many of n tokens are stored in `high` bits."""
        if self.share is not None:
            return n - int(self.share * n)
        assert self.ratio is not None
        numbers = 2 * heads * size
        scales = 32 * n + 2 * 32 * heads * size + 16 * heads * size  # of values, keys of two kinds, channels of values
        marks = 2 * heads * 8 * -(-n // 8)
        spare = 16 * (1 - self.ratio) * numbers * n - scales - marks - self.low * numbers * n
        return min(max(int(spare / (numbers * (self.high - self.low))), 0), n)

    def _mixed(
        self, keys: Tensor, values: Tensor, member: Tensor, valid: Tensor, *, most: tuple[int, int]
    ) -> tuple[Mixed, Mixed]:
        """Keys and values (B, Hkv, J, n, d), of which `member` (B, Hkv, J, n) are salient; `valid` is (B, 1, J, n).

        `most` salient and other tokens of a head at most.
        """
        top = (values.float().abs() * valid[..., None]).amax(-2, keepdim=True)
        factor = torch.where(top > 0, top, 1.0).sqrt().clamp(min=1e-4).to(torch.float16)
        values = values.float() / factor.float()
        high, low = choose(member, most[0], valid), choose(~member, most[1], valid)
        k = [Packed.of(take(keys, at), b, (max(1, at.shape[-1]), 1)) for at, b in ((high, self.high), (low, self.low))]
        v = [Joined.over(take(values, at), b) for at, b in ((high, self.high), (low, self.low))]
        return Mixed.of(member, k[0], k[1]), Mixed.of(member, v[0], v[1], factor)
