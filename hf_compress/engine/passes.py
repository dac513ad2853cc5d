"""What a further forward over a prompt reads: how much its entries are looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.layout import Layout
from hf_compress.stores import HeldLayer
from hf_compress.tensors.attention import Record, column_max


class Pass:
    """One of these forwards: reads from each layer what the entries of its part receive.

    Args:
        spans: (B, 3) int64, caller's rows [first, stop) that are ranked and the row at which the sinks end.
        rows: (B, q) bool, which rows it feeds; the others fill up.
        scores: {layer: (B, Hkv, S) fp32}, written to.
    """

    def __init__(self, spans: Tensor, rows: Tensor, scores: dict[int, Tensor]):
        self.spans, self.rows, self.scores = spans, rows, scores

    def read(self, layer: int, held: HeldLayer, record: Record) -> None:
        """Raise the scores of one layer to the largest share that a row of any query head of the group gives."""
        query, key, scaling = record
        layout = held.layout
        assert layout is not None
        at, real, ranked = layout.derive("repeated", lambda: self._columns(layout))
        rows, q = self.rows.to(key.device), query.shape[2]
        S, m = key.shape[2] - q, at.shape[1]
        wide = at[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        keys = torch.cat([key[:, :, :S].gather(2, wide), key[:, :, S:]], 2)
        every = torch.arange(q, device=key.device)

        def see(part: slice) -> Tensor:  # all of the prompt's, and of the pass what came before
            own = (every[: part.stop] <= every[part, None]) & rows[:, None, : part.stop]
            return torch.cat([real[:, None].expand(-1, own.shape[1], -1), own], 2)[:, None]

        best = column_max(query, keys, scaling, see, rows.float(), m, range(m + 1, m + q + 1)) * ranked[:, None]
        self.scores[layer].scatter_reduce_(2, at[:, None].expand_as(best), best, "amax")

    def _columns(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """(B, m) slots of the prompt that its rows share their attention with, which are real, and which are ranked."""
        S = len(layout) - self.rows.shape[1]
        index, valid = layout.index[:, :S], layout.valid[:, :S]
        first, stop, sinks = self.spans.to(index.device)[..., None].unbind(1)
        ranked = valid & (index >= first) & (index < stop)
        seen = ranked | (valid & (index < sinks))
        at = (~seen).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(seen.sum(1).max())]
        return at, seen.gather(1, at), ranked.gather(1, at)
