"""Tokens of two kinds in one layer: some are stored in more bits than the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.stores.packed import Dense, Packed, Stored
from hf_compress.tensors.kvmerge import take
from hf_compress.tensors.pack import pack, unpack


class Mixed(Stored):
    """(B, Hkv, n, d), of which every head has its own choice of tokens in `high`; more dimensions may precede n.

    Both parts hold their tokens in the order of the slots. Where heads or rows have different numbers of a kind, a
    part is as long as the largest, and what stands behind the tokens of the others is not read.

    Args:
        member: (B, Hkv, ceil(n / 8)) uint8, one bit per slot: whether it is in `high`.
        factor: (B, Hkv, 1, d), what packed parts are multiplied by (dense ones are as they are); None: 1.
    """

    def __init__(self, n: int, member: Tensor, high: Packed | Dense, low: Packed, factor: Tensor | None = None):
        self.n, self.member, self.high, self.low, self.factor = n, member, high, low, factor

    @classmethod
    def of(cls, member: Tensor, high: Packed | Dense, low: Packed, factor: Tensor | None = None) -> Mixed:
        """`member` as (B, Hkv, n) bool."""
        n = member.shape[-1]
        return cls(n, pack(F.pad(member.to(torch.uint8), (0, -n % 8)), 1), high, low, factor)

    def __len__(self) -> int:
        return self.n

    def members(self) -> Tensor:
        """(B, Hkv, n) bool: which slots are in `high`."""
        return unpack(self.member, 1)[..., : self.n].bool()

    def read(self) -> Tensor:
        member, high, low = self.members(), self.high.read(), self.low.read()
        if self.factor is not None:
            low = low * self.factor.float()
            high = high if isinstance(self.high, Dense) else high * self.factor.float()
        at = torch.where(member, member.cumsum(-1), high.shape[-2] + (~member).cumsum(-1)) - 1
        return take(torch.cat([high, low], -2), at)

    def demote(self, arrived: Packed | Dense, was: Tensor, stay: Tensor, most: tuple[int, int, int]) -> Mixed:
        """With T tokens that arrive in `high`, of which then only some may stay; the others are packed as `low` is.

        Args:
            arrived: (B, Hkv, T, d), made as `high` is.
            was: (B, Hkv, n + T) bool, the slots in `high` before any leaves; stay: same shape, those that stay.
            most: the largest numbers of slots that a head keeps in `high`, that leave it, and that are in `low` then.
        """
        member, pad = self.members(), (0, len(arrived))
        gone, high = was & ~stay, self.high.join(arrived)  # type: ignore[arg-type]
        late = len(self.high) + torch.arange(len(arrived), device=was.device)
        place = torch.cat(
            [(member.cumsum(-1) - 1).clamp(min=0), late.expand(*member.shape[:-1], -1)], -1
        )  # of each slot in `high`
        left = high.pick(place.gather(-1, choose(gone, most[1]))).read()
        if self.factor is not None and isinstance(high, Dense):
            left = left / self.factor.float()
        below = F.pad(((~member).cumsum(-1) - 1).clamp(min=0), pad)  # of each slot in `low`
        below = torch.where(gone, len(self.low) + gone.cumsum(-1) - 1, below)
        low = self.low.join(Packed.of(left, self.low.bits, self.low.group))
        high = high.pick(place.gather(-1, choose(stay, most[0])))
        low = low.pick(below.gather(-1, choose(~stay, most[2])))
        return Mixed.of(stay, high, low, self.factor)


class Joined(Packed):
    """Values (B, Hkv, n, d) in one group per i of n, over the channels of the i-th tokens of all heads."""

    heads = 1

    @classmethod
    def over(cls, x: Tensor, bits: int) -> Joined:
        """From (B, Hkv, n, d)."""
        flat = x.movedim(1, -2).flatten(-2)[:, None]
        joined = cls.of(flat, bits, (1, flat.shape[-1]))
        joined.heads = x.shape[1]
        return joined

    def read(self) -> Tensor:
        return super().read()[:, 0].unflatten(-1, (self.heads, -1)).movedim(-2, 1)


def choose(member: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """(..., count) the slots where `member` (..., n) bool is set, ascending.

    Those that are not `valid`, and what follows where there are fewer than `count`, repeat the first that is, so that
    they do not widen a range.
    """
    at = member.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :count]
    good = (member if valid is None else member & valid).gather(-1, at)
    first = good.to(torch.uint8).argmax(-1, keepdim=True) if count else at
    return torch.where(good, at, at.gather(-1, first))


def highest(score: Tensor, counts: Tensor) -> Tensor:
    """(..., n) bool: the `counts` (broadcast to (..., 1)) highest scores; of equal ones the lower index."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device) < counts.expand(*score.shape[:-1], 1)
    )
