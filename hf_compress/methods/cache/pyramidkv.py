"""PyramidKV: SnapKV with budgets that fall with depth (arXiv:2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass

from hf_compress.methods.cache.snapkv import SnapKV
from hf_compress.registry import register


@register("pyramidkv", stage="cache", kind="attention", paper="arXiv:2406.02069")
@dataclass
class PyramidKV(SnapKV):
    """SnapKV whose first layers keep more entries than its last ones.

    Beyond the window the last layer keeps a twentieth of the mean budget and the first as much more; all layers
    together keep exactly what `ratio` says (the released code rounds every step down and misses it). The same as
    `compress("snapkv", budget="pyramid")` with the window of the paper.

    Source: "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv:2406.02069. Cost:
    that of SnapKV.
    """

    window: int = 8
    budget: str = "pyramid"
