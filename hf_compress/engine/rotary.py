"""Rotations of the rows of a prompt, undone, redone and foreseen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Rotary:
    """Rotations of the rows of a prompt: cos and sin (B or 1, S, d'), and the model's function that applies them.

    Where only the first d' channels of a head turn, the others pass as they are.

    Args:
        ahead: count -> mean cos and sin (B or 1, 1, d') of so many positions after the prompt, fp32.
    """

    def __init__(
        self,
        tables: tuple[Tensor, Tensor],
        function: Callable[..., tuple[Tensor, Tensor]],
        ahead: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    ):
        self.cos, self.sin, self.function, self._ahead = *tables, function, ahead
        self._inverse: tuple[Tensor, Tensor] | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Rotated (B, H, S, d)."""
        return turn(self.function, x, self.cos, self.sin)

    def back(self, x: Tensor) -> Tensor:
        """The same before its rotation; tables may carry a factor (YaRN)."""
        if self._inverse is None:
            scale = (self.cos.float().square() + self.sin.float().square()).mean().to(x.dtype)
            self._inverse = self.cos / scale, -self.sin / scale
        return turn(self.function, x, *self._inverse)

    def newest(self, rows: int) -> Rotary:
        """Of the newest rows alone."""
        return Rotary((self.cos[:, -rows:], self.sin[:, -rows:]), self.function)

    def ahead(self, count: int, size: int) -> Tensor:
        """(B or 1, size, size) fp32: the mean rotation of the next `count` positions; rows of vectors times it."""
        if self._ahead is None:
            raise RuntimeError("rotations after the prompt are not known here")
        cos, sin = (t.expand(-1, size, -1) for t in self._ahead(count))
        basis = torch.eye(size, device=cos.device).expand(len(cos), 1, -1, -1)
        return Rotary((cos, sin), self.function).apply(basis)[:, 0]  # linear in cos and sin, so of their means too


def turn(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, S, d) turned by the model's `function` in the channels that the tables have."""
    d = cos.shape[-1]
    turned = function(x[:, :0, :, :d], x[..., :d], cos, sin)[1]  # two at once, queries and keys alike: here no queries
    return turned if d == x.shape[-1] else torch.cat([turned, x[..., d:]], -1)
