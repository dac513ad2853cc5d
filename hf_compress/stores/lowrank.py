"""One low-rank factor for a group of layers (arXiv:2503.18893)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress.signals import CacheView
from hf_compress.stores.dense import HeldLayer
from hf_compress.stores.shared import Shared, check_same_rows
from hf_compress.stores.store import Store
from hf_compress.tensors.svd import factors

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, cos, sin) -> rotated x


class LowRank:
    """Keys or values (B, Hkv, n, d) of one layer as a product.

    Args:
        left: shared (B, n, r), the coordinates of every token.
        right: (B, r, Hkv, d), what they stand for in this layer.
        tables: shared cos and sin (B or 1, n, d') of the rows; None: nothing is rotated (values).
        turn: rotates by them.
    """

    tight = False

    def __init__(self, left: Shared, right: Tensor, tables: Shared | None = None, turn: Turn | None = None):
        self.left, self.right, self.tables, self.turn = left, right, tables, turn
        self._mine = [*left.claim(), *(tables.claim() if tables is not None else [])]

    def __len__(self) -> int:
        return self.left.parts[0].shape[1]

    def read(self) -> Tensor:
        x = torch.einsum("bnr,brhd->bhnd", self.left.parts[0].expand(len(self.right), -1, -1), self.right)
        if self.tables is None or self.turn is None:
            return x
        return self.turn(x.float(), *self.tables.parts)

    def tensors(self) -> list[Tensor]:
        return [self.right, *self._mine]

    def rows(self, which: Tensor) -> LowRank:
        tables = None if self.tables is None else self.tables.rows(which)
        return LowRank(self.left.rows(which), self.right[which.to(self.right.device)], tables, self.turn)

    def to(self, device: torch.device) -> LowRank:
        if device == self.right.device:
            return self
        tables = None if self.tables is None else self.tables.to(device)
        return LowRank(self.left.to(device), self.right.to(device), tables, self.turn)


@dataclass(frozen=True)
class LowRankStore(Store):
    """Factorises the prompt of a group of layers when the last of them is complete; later tokens stay as they are.

    Keys before their rotation, values as they are, of all layers and heads side by side: (n, W = layers Hkv d).

    Args:
        ratio: fraction of the bytes to remove; ranks follow from it and from the length of each sample.
        ranks: of keys and values, where no ratio is given; a sample that they do not make smaller stays as it is, to
            rounding where it lies beside longer ones.
        layers: how many layers of the model are packed; they share the rotation tables.
    """

    ratio: Fraction | None
    ranks: tuple[int, int]
    layers: int

    def settle(self, held: Sequence[HeldLayer], views: Sequence[CacheView] | None) -> None:
        """Factorise."""
        if views is None:
            return
        check_same_rows([layer.layout for layer in held])
        H, _, d = views[0].keys.shape[1:]
        width = len(held) * H * d
        lengths = views[0].lengths.flatten()
        k, v = self._ranks(lengths, width, H)
        smaller = (k + v) * (lengths + width) < 2 * lengths * width
        if not smaller.any():
            return
        # A sample that would stay as it is alone is held exactly beside longer ones, whatever bytes that takes.
        exact = lengths.clamp(max=width)
        k, v = torch.where(smaller, k, exact), torch.where(smaller, v, exact)
        keys = self._factorise([view.unrotate(view.keys.float()) for view in views], views[0].valid, k)
        values = self._factorise([view.values for view in views], views[0].valid, v)
        dtype = views[0].keys.dtype
        left = [Shared(x.to(dtype)) for x in (keys[0], values[0])]
        for layer, view, right_k, right_v in zip(held, views, keys[1], values[1]):
            rotated = LowRank(left[0], right_k.to(dtype), *_tables(layer, view))
            place = layer.keys.device
            layer.pack(rotated.to(place), LowRank(left[1], right_v.to(dtype)).to(place))

    def _factorise(self, x: list[Tensor], valid: Tensor, ranks: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, n, r) for the group, and (B, r, Hkv, d) per layer, from (B, Hkv, n, d) per layer."""
        home = x[0].device
        rows = torch.cat([(t.to(home) * valid[..., None]).transpose(1, 2).flatten(2) for t in x], 2)
        left, right = factors(rows, ranks)
        left = left * valid[:, 0, :, None]  # padding comes back as rounding errors
        return left, [part.unflatten(2, x[0].shape[1::2]).clone() for part in right.chunk(len(x), 2)]

    def _ranks(self, lengths: Tensor, width: int, heads: int) -> tuple[Tensor, Tensor]:
        """(B,) ranks of keys and of values."""
        most = lengths.clamp(max=width)
        if self.ratio is None:
            return most.clamp(max=self.ranks[0]), most.clamp(max=self.ranks[1])
        if int(lengths.max()) < width:
            warnings.warn(
                f"low rank: {int(lengths.max())} tokens are few against the {width} numbers that the layers of a group "
                "hold per token: what the tokens share takes most of the budget and little rank is left; use a smaller "
                "group, longer prompts, or a method that evicts or quantises",
                stacklevel=2,
            )
        pairs = [self._split(n, width, heads) for n in lengths.tolist()]
        k, v = torch.tensor(pairs, device=lengths.device).T
        return k, v

    def _split(self, length: int, width: int, heads: int) -> tuple[int, int]:
        """Ranks of keys and values of a sample, 2 : 3 and at least 1, whose factors and tables meet the ratio."""
        assert self.ratio is not None
        tables = Fraction(1, self.layers * heads)  # cos and sin of a token against all its keys and values
        rank = Fraction(1, width) + Fraction(1, max(length, 1))  # bytes of one rank of both, as a part of all
        total = (2 * (1 - self.ratio - tables) / rank).__floor__()
        v = min(max(total * 3 // 5, 1), length, width)
        return min(max(total - v, 1), length, width), v


def _tables(layer: HeldLayer, view: CacheView) -> tuple[Shared | None, Turn | None]:
    """The rotation of a layer, one copy for all layers that turn alike; nothing where it does not rotate."""
    cos, sin, turn = view.rotation
    if not bool(sin.any()) and bool((cos == 1).all()):
        return None, None
    assert layer.layout is not None
    return layer.layout.derive(("tables", id(cos)), lambda: Shared(cos, sin)), turn
