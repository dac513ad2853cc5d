"""FastV: one cut after layer 2, by the attention of the last prompt token (arXiv:2403.06764)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from hf_compress import budget
from hf_compress.methods.base import DecoderMethod, check_count
from hf_compress.registry import register


@register("fastv", stage="decoder", kind="dropping", paper="arXiv:2403.06764", needs={"visual"})
@dataclass
class FastV(DecoderMethod):
    """One cut before a decoder layer by the attention that the last prompt token pays.

    Layers 0 .. layer-1 run in full; the attention row of the last prompt token in layer `layer - 1`, averaged over
    heads, ranks the visual tokens; from `layer` on round(V (1 - R)) of V remain, with R = ratio * T / (T - layer) so
    that `ratio` is the average over all T layers. Positions are kept. The paper speaks of the average attention
    received; its code uses the last row only, and so do we.

    Source: An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024, arXiv:2403.06764. Cost: one row, O(V H d).

    Args:
        layer: K, the first short layer.
    """

    layer: int = 2

    example = {"ratio": 0.4, "layer": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("layer", self.layer)

    def boundaries(self, layers: int) -> Sequence[int]:
        return (self.layer,)

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        if self.layer >= layers:
            raise ValueError(f"layer={self.layer} must lie within the {layers} decoder layers, 1 <= layer < {layers}")
        removed = ratio * layers / (layers - self.layer)
        if removed >= 1:
            most = Fraction(layers - self.layer, layers)
            raise ValueError(
                f"ratio={float(ratio):.4g} cannot be reached by a cut before layer {self.layer} of {layers}: "
                f"reachable is 0 <= ratio < {float(most):.4g}; cut earlier, or remove less"
            )
        return {self.layer: budget.kept(tokens, removed)}
