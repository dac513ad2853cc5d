"""MiniCache: neighbouring layers share directions (arXiv:2405.14366)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from hf_compress.methods.base import CacheMethod, check_choice, check_count, check_number, head_size
from hf_compress.registry import register
from hf_compress.stores.merged import MergedStore
from hf_compress.stores.store import Store

WIDTHS = (16, 8, 4)


@register("minicache", stage="cache", kind="merging", paper="arXiv:2405.14366")
@dataclass
class MiniCache(CacheMethod):
    """Store one direction for two neighbouring layers, and the norms of each; nothing is evicted.

    Per token and head, keys and values apart, the unit vectors of the two layers are interpolated on the sphere. Pairs
    that differ most stay as they are: those whose cosine is in the lowest `retain` of the range of cosines of the
    sample (heads together; the paper does not settle over what the range is taken). Tokens after the prompt stay as
    they are, where the paper merges them too. `ratio` (fraction of bytes) chooses the first merged layer, from the
    last one backwards, and above what 16 bits reach also the bits of the directions. It counts on the share `retain`
    staying apart; how many really do depends on the prompt, and the report says what came of it.

    It takes neighbouring layers to be alike, as in the deeper half of large models. In a model of few layers they are
    not (recall model: mean cosine of neighbours below .1), and merging them loses more than evicting at random where
    the question comes later (19.2 % against 58.8 % at half; 40.8 % against 37.1 % where the prompt holds it); there are
    few ratios to choose from too, as a pair is merged as a whole.

    Source: "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models", NeurIPS 2024,
    arXiv:2405.14366. Cost: a gather over all tokens of a merged layer at every step.

    Args:
        t: where the common direction stands between the first layer (0) and the second (1).
        retain: 1 keeps all pairs apart.
        start: first merged layer, where `ratio` is not given (default: half of them); sliding layers do not count.
        bits: of the directions, 16 (as they are), 8 or 4; default: 16, or what `ratio` needs.
    """

    t: float = 0.6
    retain: float = 0.05
    start: int | None = None
    bits: int | None = None

    example = {"start": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("t", "retain"):
            check_number(name, getattr(self, name), 0, 1)
        if self.start is not None:
            check_count("start", self.start, least=0)
        check_choice("bits", self.bits, (None, *WIDTHS))
        self._ratio, self._size, self._width = Fraction(0), 0, self.bits or WIDTHS[0]

    def prepare(self, model: nn.Module, ratio: Fraction | None) -> None:
        self._size = head_size(model)
        self._ratio = ratio or Fraction(0)
        if self._ratio and self.start is not None:
            raise ValueError(
                f"ratio={float(self._ratio):.4g} chooses the first merged layer; leave out start={self.start}"
            )

    def groups(self, layers: list[int]) -> list[list[int]]:
        start = self._first(len(layers))
        pairs = [layers[i : i + 2] for i in range(start, len(layers), 2)]
        return [[layer] for layer in layers[:start]] + pairs

    def packing(self) -> Store | None:
        return self._store(self._width)

    def _store(self, width: int) -> MergedStore:
        return MergedStore(self.t, self.retain, width)

    def _first(self, layers: int) -> int:
        """The first of so many layers that is merged; sets the bits."""
        if not self._ratio:
            start = layers // 2 if self.start is None else self.start
            if start > layers - 2:
                raise ValueError(f"start={start}: of {layers} layers no two are left to merge; start earlier")
            return start
        ceiling = 0.0
        for width in WIDTHS if self.bits is None else (self.bits,):
            self._width, pair = width, 2 * self._store(width).removed(self._size) / layers
            ceiling = layers // 2 * pair
            for pairs in range(1, layers // 2 + 1):
                if pairs * pair >= self._ratio:
                    return layers - 2 * pairs
        raise ValueError(
            f"ratio={float(self._ratio):.4g}: with directions of {self._width} bits and retain={self.retain}, merging "
            f"all {layers} layers in pairs removes {ceiling:.4g} of the bytes; ask for 0 to {ceiling:.4g}"
        )
