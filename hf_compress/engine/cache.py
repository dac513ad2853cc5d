"""The cache stage: score, budget, evict; at the end of the prompt, and while decoding where the policy says so."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.engine.masks import visible
from hf_compress.layout import Layout
from hf_compress.methods.base import CacheMethod
from hf_compress.stores import HeldLayer
from hf_compress.tensors.attention import Record, column_sums, group_mean, rows_attention


class StoredView:
    """The entries of one layer: the `CacheView` that a method sees.

    Args:
        prompt: the layout of the prompt while it is still whole, and `record` its (query, key, scaling); both None
            while decoding.
    """

    def __init__(
        self, held: HeldLayer, layer: int, layers: int, budget: Tensor, prompt: Layout | None, record: Record | None
    ):
        assert held.layout is not None and held.keys is not None and held.values is not None
        self._held, self._prompt, self._record = held, prompt, record
        self.layer, self.layers, self.budget = layer, layers, budget[:, None, None]
        self.incoming = int(prompt is None)
        self.keys, self.values, self.scores = held.keys, held.values, held.scores
        valid = held.layout.valid
        self.valid = valid if valid.ndim == 3 else valid[:, None]
        self.order = held.layout.derive("order", lambda: self.valid.long().cumsum(-1) - 1)
        self.lengths = held.layout.derive("lengths", lambda: self.valid.sum(-1, keepdim=True))

    def _whole_prompt(self) -> tuple[Layout, Tensor, float]:
        if self._record is None or self._prompt is None:
            raise RuntimeError("attention rows can be read at the end of the prompt only")
        return self._prompt, self._record[0], self._record[2]

    def window_attention(self, rows: Tensor) -> Tensor:
        prompt, query, scaling = self._whole_prompt()
        window = self._held.window
        at, real, see = prompt.derive(("newest", tuple(rows.tolist()), window), lambda: _newest(prompt, rows, window))
        q = query.gather(2, at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1]))
        return group_mean((rows_attention(q, self.keys, scaling, see) * real).sum(2), self.keys.shape[1])

    def column_sums(self, *, normalize: bool) -> Tensor:
        prompt, query, scaling = self._whole_prompt()

        def see(part: slice) -> Tensor:
            at = torch.arange(len(prompt), device=query.device)[part].expand(query.shape[0], -1)
            return visible(prompt, prompt.gather(at), self._held.window, None)

        sums = column_sums(query, self.keys, scaling, see, prompt.valid.float())
        if not normalize:
            return sums
        return sums / (self.lengths - self.order).clamp(min=1)  # an entry is seen by itself and every later row


def _newest(prompt: Layout, rows: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The newest rows[b] valid rows of each sample: (B, w) indices, which of them are real, what they see."""
    newest = prompt.valid.long().flip(1).cumsum(1).flip(1)  # 1 on the newest valid row, 2 on the one before ...
    inside = prompt.valid & (newest <= rows[:, None])
    at = inside.long().argsort(dim=1, stable=True)[:, -int(rows.max()) :]  # short rows are filled up in front
    return at, inside.gather(1, at)[:, None, :, None], visible(prompt, prompt.gather(at), window, None)


def entries(lengths: Tensor, ratio: Fraction | None, keep: int | None) -> Tensor:
    """(B,) entries per head for rows of the given lengths."""
    if keep is not None:
        return torch.full_like(lengths, keep)  # more than there is: nothing goes yet
    counts = [budget.kept(n, ratio or Fraction(0), floor=True) for n in lengths.tolist()]
    return torch.tensor(counts, device=lengths.device)


def best_slots(score: Tensor, valid: Tensor, counts: Tensor) -> tuple[Tensor, Tensor | None]:
    """The `counts[b]` best slots of every head, ascending; of equal scores the lower index wins.

    Args:
        score: (B, Hkv, S); valid: (B, 1 or Hkv, S); counts: (B,).

    Returns:
        (B, Hkv, n) with n the largest count, and the bool mask of real slots where rows have fewer (else None).
    """
    least, n = counts.min().item(), counts.max().item()
    if least == n:
        best = score.masked_fill(~valid, float("-inf")).sort(dim=-1, descending=True, stable=True).indices[..., :n]
        return best.sort(dim=-1).values, None
    ranked = score.masked_fill(~valid, float("-inf")).sort(dim=-1, descending=True, stable=True).indices[..., :n]
    real = torch.arange(n, device=score.device) < counts[:, None, None]
    # slots that only fill up a short row go in front, so that real ones stay the newest
    key = torch.where(real, ranked, ranked - score.shape[-1])
    at = key.argsort(-1)
    slots, mask = ranked.gather(-1, at), real.expand_as(ranked).gather(-1, at)
    return slots, None if bool(real.all()) else mask


class CachePolicy:
    """One cache method with its budget, applied to the layers of whatever cache arrives."""

    def __init__(self, method: CacheMethod, ratio: Fraction | None, keep: int | None, layers: int):
        self.method, self.ratio, self.keep, self.layers = method, ratio, keep, layers

    @torch.no_grad()
    def after_prompt(self, held: HeldLayer, layer: int, prompt: Layout, record: Record | None) -> None:
        """Evict at the end of the prompt; attention has used all keys and values of this pass."""
        if self.ratio == 0:
            return
        lengths = prompt.derive("rows", lambda: prompt.valid.sum(-1))
        mean = prompt.derive("entries", lambda: entries(lengths, self.ratio, self.keep))
        counts = self.method.layer_budget(mean, lengths, layer, self.layers)
        held.budget = counts
        view = StoredView(held, layer, self.layers, counts, prompt, record)
        if self.method.running:
            held.scores = view.scores = self.method.begin(view)
        if bool((counts < lengths).any()):
            held.select(*best_slots(self.method.score(view), view.valid, torch.minimum(counts, lengths)))

    @torch.no_grad()
    def before_step(self, held: HeldLayer, layer: int) -> None:
        """Make room for the next token, so that a held cache returns to its budget with it."""
        if self.method.policy != "hold" or held.budget is None or held.layout is None:
            return
        room = held.budget - 1
        if int(room.max()) < len(held.layout):
            view = StoredView(held, layer, self.layers, held.budget, None, None)
            held.select(
                *best_slots(self.method.score(view), view.valid, torch.minimum(room, view.lengths.amax((1, 2))))
            )

    @torch.no_grad()
    def after_step(self, held: HeldLayer, queries: Layout, record: Record) -> None:
        """Add the attention of the newest rows to a running score."""
        if held.scores is None or held.layout is None:
            return
        query, key, scaling = record
        a = rows_attention(query, key, scaling, visible(held.layout, queries, held.window, None))
        held.scores = held.scores + group_mean((a * queries.valid[:, None, :, None]).sum(2), held.scores.shape[1])
