"""Token Sparse Attention: every head attends among its own rows of the prompt, which are all there again behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress import budget
from hf_compress.methods.base import DecoderMethod, check_choice, check_count, check_layers, check_number
from hf_compress.registry import register
from hf_compress.signals import DecoderView, Read
from hf_compress.tensors.rows import best_rows


@register("token_sparse", stage="decoder", kind="skipping", paper="arXiv:2602.03216")
@dataclass
class TokenSparse(DecoderMethod):
    """In some layers every head attends among rows of its own choice; the others skip the attention there, not the MLP.

    The `window` last rows of the prompt, and what a head chooses of the rows before, are gathered, go through the
    layer's own causal attention, and are put back; rows that a head leaves out get nothing from it. A head chooses by
    what the window attends to, mean over its rows, then over `pool` neighbours. All keys and values are cached, so that
    what is generated sees everything. `ratio` is the share of rows that attention is spared, over all heads and layers;
    the cost of attention falls with the square of what is left.

    With `ratio="adaptive"` the authors' rule decides how many: of the scores, mean over heads, scaled to a sum of 1 and
    ascending, those whose cumulative sum is below `coverage`, and one more, but at least `least` rows stay, and where
    there is none below, nothing goes. The authors choose the layers where rows change least (15 to 30 of 32 of
    Llama-3.1-8B); here it is the upper half, which is theirs where nothing was measured.

    Source: Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection, arXiv:2602.03216.
    Cost: in each of the layers the attention rows of the window, O(`window` L H d), and copies of what is gathered; it
    pays from some thousands of rows on.

    Args:
        layers: in which heads choose, ascending; default the upper half.
        window: rows at the end of the prompt that always take part, and vote.
        pool: neighbours over which votes are averaged, odd.
        per: "head", or "kv": heads that share keys choose together, and less is copied.
        coverage, least: of the rule.

    Raises:
        ValueError: a knob is none of its values, or the ratio is more than these layers can spare.
    """

    layers: Sequence[int] | None = None
    window: int = 128
    pool: int = 7
    per: str = "head"
    coverage: float = 0.005
    least: int = 1024

    adaptive: ClassVar[bool] = True
    example = {"ratio": 0.25, "window": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window)
        check_count("pool", self.pool)
        check_choice("per", self.per, ("head", "kv"))
        check_number("coverage", self.coverage, 0, 1, above=True)
        check_count("least", self.least, least=0)
        if self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd, so that pooling is centred")
        if self.scope == "per_image":
            raise ValueError("scope='per_image' shares a budget over images, and rows of text are chosen here, too")
        if self.layers is not None:
            check_layers("layers", self.layers)
            self.layers = tuple(self.layers)

    def boundaries(self, layers: int) -> Sequence[int]:
        at = self.layers or range(layers - layers // 2, layers)
        if at[-1] >= layers or len(set(at)) < len(at):
            raise ValueError(f"layers={self.layers!r} does not fit a decoder of {layers} layers; name others")
        return at

    def reads(self, depth: int) -> set[Read]:
        return set()

    def removable(self, view: DecoderView) -> Tensor:
        return view.prompt & (view.last >= self.window) & ~view.speaks

    def units(self, images: int) -> int:
        return 1

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        at, spared = self.boundaries(layers), ratio * layers
        if spared > len(at):
            raise ValueError(
                f"ratio={float(ratio):.4g} cannot be reached in layers {tuple(at)} of {layers}: reachable is 0 <= "
                f"ratio <= {float(Fraction(len(at), layers)):.4g}; name more layers, or spare less"
            )
        counts = budget.shares(round(tokens * (len(at) - spared)), [1] * len(at), [tokens] * len(at))
        return dict(zip(at, counts))

    def among(self, view: DecoderView, keep: list[int] | None) -> Tensor | None:
        votes = view.prompt & (view.last < self.window)
        score = view.attention(source="own", voters=votes, of=lambda a: a)  # (B, H, S)
        score = score.masked_fill(~view.removable[:, None], 0)
        score = F.avg_pool1d(score, self.pool, stride=1, padding=self.pool // 2)
        if self.per == "kv":
            score = score.unflatten(1, (view.kv_heads, -1)).mean(2)
        if keep is None:
            keep = self._rule(score.mean(1), view.removable)
        B, H, S = score.shape
        each = view.removable.repeat_interleave(H, 0)
        return best_rows(score.flatten(0, 1), each, [n for n in keep for _ in range(H)]).view(B, H, S)

    def _rule(self, score: Tensor, among: Tensor) -> list[int]:
        """How many of the rows that are True in `among` (B, S) stay in each sample, by their scores (B, S)."""
        counts = among.sum(1).tolist()
        below = [removed(mine[rows], self.coverage) if n else 0 for mine, rows, n in zip(score, among, counts)]
        return [max(min(n, self.least), n - low) for n, low in zip(counts, below)]


def removed(score: Tensor, coverage: float) -> int:
    """How many of the lowest `score` (n,) hold less than `coverage` of the whole, and one more; 0 where none do."""
    share = (score / score.sum().clamp(min=torch.finfo(score.dtype).tiny)).sort().values.cumsum(0)
    below = int((share < coverage).sum())
    return below + 1 if below else 0
