"""Codes with what they miss: a low-rank part of the error, and outliers kept as they are (arXiv:2403.05527)."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress.stores.packed import Packed, Stored
from hf_compress.tensors.lowrank import power_iteration
from hf_compress.tensors.pack import nearest_valid

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
        line = cls._lines(x, tokens)
        size = line.shape[-1]
        lengths = valid.sum(-1)[..., None, None] if tokens else torch.tensor(size, device=x.device)
        hidden = line.masked_fill(~valid[..., None, :], torch.inf) if tokens else line
        counts = lengths * share.numerator // share.denominator
        j = torch.arange(int(size * share), device=x.device)
        place = torch.where(j < counts // 2, j, lengths - counts + j)  # beyond `counts`: padding, which nobody reads
        at = hidden.argsort(dim=-1, stable=True).gather(-1, place.expand(*line.shape[:-1], -1))
        small = (at - SHORT).to(torch.int16 if size <= 2 * SHORT else torch.int32)
        return cls(tokens, small, line.gather(-1, at).to(dtype))

    def put(self, x: Tensor, value: float | None = None) -> Tensor:
        """(B, Hkv, ..., n, d) with the outliers in their places, or `value` there."""
        line, at = self._lines(x, self.tokens), self.at.long() + SHORT
        line = line.scatter(-1, at, self.value.to(x.dtype)) if value is None else line.scatter(-1, at, value)
        return line.mT if self.tokens else line[:, 0].unflatten(-1, (x.shape[1], -1)).movedim(-2, 1)

    @staticmethod
    def _lines(x: Tensor, tokens: bool) -> Tensor:
        """(B, Hkv, ..., d, n) or (B, 1, ..., n, Hkv * d)."""
        return x.mT if tokens else x.movedim(1, -2).flatten(-2)[:, None]


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
        x, real, outliers = x.float(), valid[..., None].expand(x.shape), None
        rest, counted = x, real
        if share:
            outliers = Outliers.of(x, share, tokens, valid, half)
            counted = outliers.put(real.float(), 0.0).bool()
            line = -2 if tokens else (1, -1)
            mean = (x * counted).sum(line, keepdim=True) / counted.sum(line, keepdim=True).clamp(min=1)
            rest = torch.where(counted, x, mean)
        codes = quantise(nearest_valid(rest, valid))
        left = right = None
        if rank := min(rank, *x.shape[-2:]):
            left, right = power_iteration((x - codes.read()) * counted, rank, rounds)
            left, right = left.to(half), right.to(half)
        return cls(codes, left, right, outliers)

    def __len__(self) -> int:
        return len(self.codes)

    def read(self) -> Tensor:
        x = self.codes.read()
        if self.left is not None and self.right is not None:
            x = x + self.left.float() @ self.right.float().mT
        return x if self.outliers is None else self.outliers.put(x)
