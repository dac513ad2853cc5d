"""EVE's InterleavedVT: frames averaged in cells, each followed by queries that look at its neighbours too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.budget import shares
from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.modules.attention import Attention, Mlp, Pooling
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.cells import cells, means

__all__ = ["InterleavedVT"]


@register("interleaved_vt", stage="vision", kind="trained", paper="arXiv:2503.04058", needs={"visual"})
@dataclass
class InterleavedVT(VisionMethod):
    """Every frame as means of its cells, and behind them what trained queries find in it and in its neighbours.

    The K tokens are shared evenly over the T frames. Of k tokens of a frame min(`queries`, k // 3) are queries, which
    stand in its last slots; the others are the means of so many cells of its projected tokens (n, N, D). The queries
    attend to all tokens of the frame, the one before and the one behind it, twice: first as means of them
    (`modules.attention.Pooling`), then adding to these. `ratio` is the fraction of the whole video. Cost
    O(T * N * D * C), C <= 512 channels of attention. An image is one frame.

    Source: "EVE: Towards End-to-End Video Subtitle Extraction with Vision-Language Models", arXiv:2503.04058, its
    adapter, which has no code. It says that frames are pooled, that a Q-Former slides over them, and that both are
    interleaved; how many queries, how far the window goes and what is trained for it does not say: 16 means and 8
    queries of a frame, and a window of three frames, are ours.

    Args:
        queries: trained ones, and most of a frame.

    Raises:
        ValueError: `queries` is no integer of at least 1, or `positions` none of its values.
    """

    queries: int = 8

    scope: ClassVar[str] = "video"
    needs_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("queries", self.queries)

    def module(self, model: nn.Module) -> nn.Module:
        """The queries."""
        return Sliding(model.config.get_text_config().hidden_size, self.queries)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The middle tokens of so many cells of each frame, (n, K)."""
        h, w = tokens.grids[0]
        counts = shares(keep, [1.0] * len(tokens.grids), [h * w] * len(tokens.grids))
        kept = [t * h * w + cells(h, w, k).centres for t, k in enumerate(counts) if k]
        return Assignment(torch.cat(kept).to(tokens.device).repeat(len(tokens), 1))

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        assert tokens.module is not None
        x = tokens.embeddings.unflatten(1, (len(tokens.grids), -1))
        counts = torch.bincount(assignment.kept[0] // x.shape[2], minlength=x.shape[1]).tolist()
        out: Tensor = tokens.module(x, tokens.grids[0], counts)
        return out


class Sliding(nn.Module):
    """See `InterleavedVT`."""

    def __init__(self, width: int, queries: int):
        super().__init__()
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(queries, width), std=0.02))
        self.norm, self.norm_query = nn.LayerNorm(width), nn.LayerNorm(width)
        self.first, self.again, self.mlp = Pooling(width), Attention(width), Mlp(width)

    def forward(self, x: Tensor, grid: tuple[int, int], counts: list[int]) -> Tensor:
        """(n, T, N, D) to (n, K, D), `counts` of each frame."""
        n, parts = len(x), dict[int, Tensor]()
        for k in sorted({k for k in counts if k}):
            at = [t for t, count in enumerate(counts) if count == k]
            few = min(len(self.query), k // 3)
            pooled = means(x[:, at].flatten(0, 1), cells(*grid, k - few, x.device)).unflatten(0, (n, -1))
            made = torch.cat([pooled, self.found(x, at, few)], 2)
            parts |= dict(zip(at, made.unbind(1)))
        return torch.cat([parts[t] for t in sorted(parts)], 1)

    def found(self, x: Tensor, at: list[int], few: int) -> Tensor:
        """(n, F, few, D): what the first queries find around the frames `at`."""
        n, N = len(x), x.shape[2]
        around = torch.tensor(at, device=x.device)[:, None] + torch.arange(3, device=x.device)
        seen = F.pad(x, (0, 0, 0, 0, 1, 1))[:, around].flatten(2, 3).flatten(0, 1)  # (n * F, 3 * N, D)
        real = ((around > 0) & (around <= x.shape[1])).repeat_interleave(N, 1).repeat(n, 1)  # beyond the ends: nothing
        query, normed = self.norm_query(self.query[:few]), self.norm(seen)
        told = self.first(query, normed, normed, seen, real[:, None])
        out: Tensor = self.mlp(self.again(told, seen, seen=real)).unflatten(0, (n, -1))
        return out
