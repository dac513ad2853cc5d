"""xKV: one low-rank factor shared by neighbouring layers (arXiv:2503.18893)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from hf_compress.methods.base import CacheMethod, check_count
from hf_compress.registry import register
from hf_compress.stores.lowrank import LowRankStore
from hf_compress.stores.store import Store


@register("xkv", stage="cache", kind="merging", paper="arXiv:2503.18893")
@dataclass
class XKV(CacheMethod):
    """Store the prompt of `group` layers as one singular value decomposition; nothing is evicted.

    Keys before their rotation and values are laid side by side over layers and heads, and decomposed per sample in
    fp64: the coordinates of the tokens are stored once, what they stand for per layer. `ratio` (fraction of bytes, the
    rotation tables that reading needs included) gives the ranks of keys and values, 2 : 3, from the length of each
    sample; without it `key_rank` and `value_rank` say them, and a prompt too short to gain by them stays as it is.
    With few tokens against group * KV heads * head size little rank is left for a ratio (warned about). Tokens after
    the prompt stay exact. The released code multiplies the factors back and saves nothing; here they are what is
    stored.

    A decomposition serves the many rows of a prompt that are alike, and the few that are not lose most: where a small
    rank is left, a question that ends the prompt is not exact enough to be answered (recall model, ratio .75: 0 of 120,
    and 109 of 120 when the question comes in a second turn, whose tokens are exact).

    Source: "xKV: Cross-Layer SVD for KV-Cache Compression", arXiv:2503.18893. Cost: one decomposition of (tokens, group
    * KV heads * head size) for keys and one for values per group, which grows with the cube of the smaller side: with
    2048 tokens on a CPU core 45 % of a prefill of LLaMA-7B layers, 31 % of narrow ones; and at every step the product
    and the rotation of all tokens of a layer. Not offered: right factors calibrated offline, merging later tokens in
    blocks.

    Args:
        group: layers per decomposition, in order; the last group may have fewer.
        key_rank, value_rank: ranks where `ratio` is not given (the paper's for 8 KV heads of 128).
    """

    group: int = 4
    key_rank: int = 512
    value_rank: int = 768

    example = {"group": 2, "key_rank": 8, "value_rank": 8}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("group", "key_rank", "value_rank"):
            check_count(name, getattr(self, name))
        self._ratio: Fraction | None = None
        self._layers = 0

    def prepare(self, model: nn.Module, ratio: Fraction | None) -> None:
        self._ratio = ratio

    def groups(self, layers: list[int]) -> list[list[int]]:
        self._layers = len(layers)
        return [layers[i : i + self.group] for i in range(0, len(layers), self.group)]

    def packing(self) -> Store | None:
        return LowRankStore(self._ratio, (self.key_rank, self.value_rank), self._layers)
