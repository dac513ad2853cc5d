"""Keys and values in 1, 2, 4 or 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.stores.ragged import Ragged
from hf_compress.tensors.kvmerge import take
from hf_compress.tensors.pack import dequantize, pack, quantize, unpack

if TYPE_CHECKING:
    from typing_extensions import Self


class Stored:
    """A body made of tensors, in each of which the batch comes first, and of other bodies."""

    tight: ClassVar[bool] = False

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self) -> Tensor:
        """(B, Hkv, n, d): what is packed comes back in fp32, with any finite numbers in slots that only fill up."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """What is stored."""
        found: list[Tensor] = []
        for part in vars(self).values():
            found += [part] if isinstance(part, Tensor) else part.tensors() if hasattr(part, "tensors") else []
        return found

    def rows(self, which: Tensor) -> Self:
        """The batch rows `which` (R,), in that order."""
        return self._each(lambda t: t[which.to(t.device)], lambda body: body.rows(which))

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return self._each(lambda t: t.to(device), lambda body: body.to(device))

    def join(self, more: Self) -> Self:
        """These, and behind them along dimension 2 `more` of the same make."""
        others = iter([part for part in vars(more).values() if isinstance(part, Tensor) or hasattr(part, "tensors")])
        return self._each(lambda t: torch.cat([t, next(others)], 2), lambda body: body.join(next(others)))

    def _each(self, tensor: Callable[[Tensor], Tensor], body: Callable[[Any], Any]) -> Self:
        new = copy.copy(self)
        for name, part in vars(self).items():
            if isinstance(part, Tensor):
                setattr(new, name, tensor(part))
            elif hasattr(part, "tensors"):
                setattr(new, name, body(part))
        return new


class Dense(Stored):
    """(B, Hkv, n, d) as it is."""

    def __init__(self, x: Tensor):
        self.x = x

    def __len__(self) -> int:
        return self.x.shape[-2]

    def read(self) -> Tensor:
        return self.x

    def pick(self, at: Tensor) -> Dense:
        """The tokens `at` (B, Hkv, m)."""
        return Dense(take(self.x, at))


class Packed(Stored):
    """(B, Hkv, n, d) as packed codes, with step and minimum per group. More dimensions may stand before n.

    Groups of tokens are counted from the newest one, so the first group may be short: rows of a left-padded batch,
    which end together, are grouped as each would be alone.

    Args:
        bits: 1, 2, 4 or 8.
        group: (g, c), consecutive tokens and consecutive channels that share step and minimum.
        codes: (B, Hkv, n, d * bits / 8) uint8.
        step, low: (B, Hkv, ceil(n / g), d / c).
    """

    def __init__(self, bits: int, group: tuple[int, int], codes: Tensor, step: Tensor, low: Tensor):
        self.bits, self.group = bits, group
        self.codes, self.step, self.low = codes, step, low

    @classmethod
    def of(cls, x: Tensor, bits: int, group: tuple[int, int]) -> Self:
        """From (B, Hkv, n, d); group[1] divides d."""
        lead = -x.shape[-2] % group[0]
        if lead:
            x = torch.cat([x[..., :1, :].expand(*x.shape[:-2], lead, -1), x], -2)  # does not widen the first group
        codes, step, low = quantize(x, bits, group)
        codes = codes[..., lead:, :].clone() if lead else codes  # no view: it would keep all of them alive
        return cls(bits, group, pack(codes, bits), step, low)

    def __len__(self) -> int:
        return self.codes.shape[-2]

    def read(self) -> Tensor:
        lead = -len(self) % self.group[0]
        codes = F.pad(self.codes, (0, 0, lead, 0)) if lead else self.codes
        return dequantize(unpack(codes, self.bits), self.step, self.low, torch.float32)[..., lead:, :]

    def pick(self, at: Tensor) -> Packed:
        """The tokens `at` (B, Hkv, m), where tokens do not share a group."""
        assert self.group[0] == 1
        return Packed(self.bits, self.group, *(take(t, at) for t in (self.codes, self.step, self.low)))

    def tightened(self, counts: list[list[int]]) -> Tight:
        """The same without the first slots of heads that fill only their newest counts[b][h]."""
        groups = [[-(-n // self.group[0]) for n in row] for row in counts]
        parts = Ragged.of(self.codes, counts), Ragged.of(self.step, groups), Ragged.of(self.low, groups)
        return Tight(self.bits, self.group, (len(self), self.step.shape[-2]), *parts)


class Tight(Stored):
    """`Packed` of heads that hold different numbers of entries, end to end; zeros where there are none.

    Args:
        sizes: slots and groups of slots that all heads together span.
    """

    tight = True

    def __init__(
        self, bits: int, group: tuple[int, int], sizes: tuple[int, int], codes: Ragged, step: Ragged, low: Ragged
    ):
        self.bits, self.group, self.sizes = bits, group, sizes
        self.codes, self.step, self.low = codes, step, low

    def __len__(self) -> int:
        return self.sizes[0]

    def loose(self) -> Packed:
        """All heads at the length of the longest again."""
        n, groups = self.sizes
        parts = [(self.codes, n), (self.step, groups), (self.low, groups)]
        return Packed(self.bits, self.group, *(_spread(part, size) for part, size in parts))

    def read(self) -> Tensor:
        return self.loose().read()


def _spread(part: Ragged, size: int) -> Tensor:
    """(B, Hkv, size, w), zeros in front."""
    x = part.read()
    return F.pad(x, (0, 0, size - x.shape[2], 0))
