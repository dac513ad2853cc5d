"""Codes with what they miss: a low-rank part of the error, and outliers kept as they are (arXiv:2403.05527)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from hf_compress.signals import CacheView
from hf_compress.stores.blocks import BlockStore
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.mixed import Joined
from hf_compress.stores.packed import Packed, Stored
from hf_compress.tensors.lowrank import power_iteration
from hf_compress.tensors.pack import divisor, nearest_valid
from hf_compress.tensors.ranking import at_ranks

SHORT = 2**15  # places in lines of up to 2 * SHORT numbers are stored in 16 bits, less SHORT


class Outliers(Stored):
    """Numbers kept in 16 bits, and where each stands in its line.

    A line is a channel along the tokens (keys), or a token along the channels of all heads (values).

    Args:
        tokens: whether lines run along the tokens.
        at: (B, Hkv, ..., d, T) or (B, 1, ..., n, T) int16 (int32 where lines are long), places less `SHORT`.
        value: same shape, in 16 bits.
    """

    def __init__(self, tokens: bool, at: Tensor, value: Tensor):
        self.tokens, self.at, self.value = tokens, at, value

    @classmethod
    def of(cls, x: Tensor, share: Fraction, tokens: bool, valid: Tensor, dtype: torch.dtype) -> Outliers:
        """The floor(share * length) outermost numbers of each line of (B, Hkv, ..., n, d), half of them the lowest.

        Tokens that are not `valid` (B, 1, ..., n) are no part of a line.
        """
        line = x.mT if tokens else x.movedim(1, -2).flatten(-2)[:, None]
        size, (lengths, counts) = line.shape[-1], _counts(x, share, tokens, valid)
        hidden = line.masked_fill(~valid[..., None, :], torch.inf) if tokens else line
        j = torch.arange(int(size * share), device=x.device)
        rank = torch.where(j < counts // 2, j, lengths - counts + j)  # beyond `counts`: padding, which nobody reads
        rank = rank.expand(*line.shape[:-1], -1)
        at = at_ranks(hidden.flatten(0, -2), rank.flatten(0, -2)).view(rank.shape)
        small = (at - SHORT).to(torch.int16 if size <= 2 * SHORT else torch.int32)
        return cls(tokens, small, line.gather(-1, at).to(dtype))

    def places(self, x: Tensor) -> Tensor:
        """(B, m) where they stand in `x.flatten(1)`, of (B, Hkv, ..., n, d)."""
        at, d = self.at.long() + SHORT, x.shape[-1]
        start = torch.arange(0, x[0].numel(), d, device=x.device).view(x[0, ..., :1].shape)  # of every token
        if self.tokens:
            return (at.mul_(d) + (start[..., :1, :] + torch.arange(d, device=x.device)[:, None])).flatten(1)
        return (at + (start[:1] + at // d * (x[0, 0].numel() - d))).flatten(1)

    def put_(self, x: Tensor, places: Tensor, value: Tensor | float | None = None) -> Tensor:
        """Write the outliers into their `places` in (B, Hkv, ..., n, d); or `value` there, a number or one per line."""
        if isinstance(value, float):
            x.view(len(x), -1).scatter_(1, places, value)
        else:
            new = self.value if value is None else value.expand(self.value.shape)
            x.view(len(x), -1).scatter_(1, places, new.flatten(1).to(x.dtype))
        return x


def _counts(x: Tensor, share: Fraction, tokens: bool, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Length of the lines of (B, Hkv, ..., n, d), and how many outliers each has: (B, 1, ..., 1, 1), or one number."""
    joined = torch.tensor(x.shape[1] * x.shape[-1], device=x.device)
    lengths = valid.sum(-1)[..., None, None] if tokens else joined
    return lengths, lengths * share.numerator // share.denominator


class Corrected(Stored):
    """(B, Hkv, ..., n, d) = codes + left @ right^T, with outliers in their places.

    Args:
        left: (B, Hkv, ..., n, r), right: (B, Hkv, ..., d, r), in 16 bits; None: no low-rank part.
        outliers: None: there are none.
    """

    def __init__(self, codes: Packed, left: Tensor | None, right: Tensor | None, outliers: Outliers | None):
        self.codes, self.left, self.right, self.outliers = codes, left, right, outliers

    @classmethod
    def of(
        cls,
        x: Tensor,
        quantise: Callable[[Tensor], Packed],
        *,
        valid: Tensor,
        tokens: bool,
        share: Fraction,
        rank: int,
        rounds: int,
    ) -> Corrected:
        """From (B, Hkv, ..., n, d) and `valid` (B, 1, ..., n).

        Args:
            quantise: what makes codes of what is left when outliers are replaced by the mean of the others.
            tokens, share: of the `Outliers`.
            rank, rounds: of the low-rank part, and of the power iteration that finds it.
        """
        half = x.dtype if x.dtype.itemsize == 2 else torch.float16
        x, outliers, whole = x.float().contiguous(), None, bool(valid.all())
        rest = x
        if share:
            outliers = Outliers.of(x, share, tokens, valid, half)
            places = outliers.places(x)
            rest = outliers.put_(x.clone() if whole else x * valid[..., None], places, 0.0)
            lengths, counts = _counts(x, share, tokens, valid)
            mean = rest.sum(-2 if tokens else (1, -1), keepdim=True) / (lengths - counts).clamp(min=1)
            rest = outliers.put_(rest, places, mean.mT if tokens else mean)
        codes = quantise(rest if whole else nearest_valid(rest, valid))
        left = right = None
        if rank := min(rank, *x.shape[-2:]):
            error = x - codes.read()
            error = error if whole else error * valid[..., None]
            error = error if outliers is None else outliers.put_(error, places, 0.0)
            left, right = (t.to(half) for t in power_iteration(error, rank, rounds))
        return cls(codes, left, right, outliers)

    def __len__(self) -> int:
        return len(self.codes)

    def read(self) -> Tensor:
        x = self.codes.read().contiguous()
        if self.left is not None and self.right is not None:
            x = x + self.left.float() @ self.right.float().mT
        return x if self.outliers is None else self.outliers.put_(x, self.outliers.places(x))


@dataclass(frozen=True)
class CorrectedStore(BlockStore):
    """Everything in codes that are corrected: keys by channel and values by token.

    Args:
        plan: channels of a head to the bits, the rank and the share of outliers of a prompt.
        group: numbers that share step and minimum; None: all tokens of a channel, all channels of a token.
        later_rank: most of a block.
        rounds: of the power iteration.
    """

    plan: Callable[[int], tuple[int, int, Fraction]]
    group: int | None
    later_rank: int
    rounds: int

    continues = True

    def prompt(self, view: CacheView) -> tuple[Stored, Stored]:
        return self._corrected(view.keys[:, :, None], view.values[:, :, None], view.valid[:, :, None], None)

    def block(self, held: HeldLayer, valid: Tensor, cut: Callable[[Tensor], Tensor]) -> tuple[Stored, Stored]:
        return self._corrected(cut(held.keys), cut(held.values), cut(valid), self.later_rank)

    def _corrected(self, keys: Tensor, values: Tensor, valid: Tensor, most: int | None) -> tuple[Stored, Stored]:
        """(B, Hkv, J, n, d) each, of which `valid` (B, 1, J, n) is not padding; `most` limits the rank."""
        n, d = keys.shape[-2:]
        bits, rank, share = self.plan(d)
        rank = rank if most is None else min(rank, most)
        make = partial(Corrected.of, valid=valid, share=share, rank=rank, rounds=self.rounds)
        by_channel = lambda x: Packed.of(x, bits, (self.group or n, 1))

        def by_token(x: Tensor) -> Packed:
            return Joined.over(x, bits) if self.group is None else Packed.of(x, bits, (1, divisor(d, self.group)))

        return make(keys, by_channel, tokens=True), make(values, by_token, tokens=False)
