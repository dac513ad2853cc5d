"""The cache stage: score, budget, evict; at the end of the prompt, and while decoding where the policy says so."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.engine.masks import visible
from hf_compress.layout import Layout
from hf_compress.methods.base import CacheMethod
from hf_compress.stores import HeldLayer, Ragged
from hf_compress.tensors.attention import Record, column_sums, group_mean, rows_attention


class StoredView:
    """The entries of one layer: the `CacheView` that a method sees.

    Args:
        prompt: the layout of the prompt while it is still whole, and `record` its (query, key, scaling); both None
            while decoding.
        rotary: cos and sin of the prompt's rows, and `rotate` the function of the model that applies them.
    """

    def __init__(
        self,
        held: HeldLayer,
        layer: int,
        layers: int,
        budget: Tensor,
        prompt: Layout | None = None,
        record: Record | None = None,
        rotary: Rotary | None = None,
    ):
        assert held.layout is not None
        self._held, self._prompt, self._record, self._rotary = held, prompt, record, rotary
        self.layer, self.layers = layer, layers
        self.budget = budget.view(len(budget), -1, 1)
        self.incoming = int(prompt is None)
        self.keys, self.values = held.whole()
        self.scores = held.scores
        valid = held.layout.valid
        self.valid = valid if valid.ndim == 3 else valid[:, None]
        self.order = held.layout.derive("order", lambda: self.valid.long().cumsum(-1) - 1)
        self.lengths = held.layout.derive("lengths", lambda: self.valid.sum(-1, keepdim=True))

    @property
    def visual(self) -> Tensor:
        image = self._layout.image
        return (image if image.ndim == 3 else image[:, None]) >= 0

    @property
    def position(self) -> Tensor:
        position = self._layout.position
        return position if position.ndim == 3 else position[:, None]

    @property
    def _layout(self) -> Layout:
        assert self._held.layout is not None
        return self._held.layout

    def _whole_prompt(self) -> tuple[Layout, Tensor, float]:
        if self._record is None or self._prompt is None:
            raise RuntimeError("attention rows can be read at the end of the prompt only")
        return self._prompt, self._record[0], self._record[2]

    @property
    def queries(self) -> Tensor:
        return self._whole_prompt()[1]

    @property
    def scaling(self) -> float:
        return self._whole_prompt()[2]

    def unrotate(self, x: Tensor) -> Tensor:
        if self._rotary is None:
            raise RuntimeError("rotations can be undone at the end of the prompt only")
        return self._rotary.back(x)

    def rotate(self, x: Tensor) -> Tensor:
        if self._rotary is None:
            raise RuntimeError("rotations can be redone at the end of the prompt only")
        return self._rotary.apply(x)

    def window_rows(self, rows: Tensor) -> Tensor:
        prompt, query, scaling = self._whole_prompt()
        window = self._held.window
        at, real, see = prompt.derive(("newest", tuple(rows.tolist()), window), lambda: _newest(prompt, rows, window))
        q = query.gather(2, at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1]))
        return rows_attention(q, self.keys, scaling, see) * real

    def window_attention(self, rows: Tensor) -> Tensor:
        return group_mean(self.window_rows(rows).sum(2), self.keys.shape[1])

    def column_sums(self, *, normalize: bool = False, weight: Tensor | None = None) -> Tensor:
        prompt, query, scaling = self._whole_prompt()
        weight = prompt.valid.float() if weight is None else weight * prompt.valid

        def see(part: slice) -> Tensor:
            at = torch.arange(len(prompt), device=query.device)[part].expand(query.shape[0], -1)
            return visible(prompt, prompt.gather(at), self._held.window, None)

        sums = column_sums(query, self.keys, scaling, see, weight)
        if not normalize:
            return sums
        after = weight.flip(1).cumsum(1).flip(1)[:, None]  # an entry is seen by itself and every later row
        return sums / after.clamp(min=torch.finfo(torch.float32).tiny)


class Rotary:
    """Rotations of the rows of a prompt: cos and sin (B or 1, S, d), and the model's function that applies them."""

    def __init__(self, tables: tuple[Tensor, Tensor], function: Callable[..., tuple[Tensor, Tensor]]):
        self.cos, self.sin, self.function = *tables, function

    def apply(self, x: Tensor) -> Tensor:
        """Rotated (B, H, S, d)."""
        return self.function(x, x, self.cos, self.sin)[0]

    def back(self, x: Tensor) -> Tensor:
        """The same before its rotation; tables may carry a factor (YaRN)."""
        scale = (self.cos.float().square() + self.sin.float().square()).mean().to(x.dtype)
        return self.function(x, x, self.cos, -self.sin)[0] / scale


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
    """The best slots of every head, ascending; of equal scores the lower index wins.

    Args:
        score: (B, Hkv, S); valid: (B, 1 or Hkv, S); counts: (B,) or (B, Hkv), at most the valid slots.

    Returns:
        (B, Hkv, n) with n the largest count, and (B, Hkv) how many slots in front only fill up where counts differ
        (else None).
    """
    least, n = counts.min().item(), counts.max().item()
    ranked = score.masked_fill(~valid, float("-inf")).sort(dim=-1, descending=True, stable=True).indices[..., :n]
    if least == n:
        return ranked.sort(dim=-1).values, None
    counts = counts.view(len(counts), -1, 1).expand(-1, score.shape[1], -1)
    real = torch.arange(n, device=score.device) < counts
    # slots that only fill up go in front, so that real ones stay the newest
    at = torch.where(real, ranked, ranked - score.shape[-1]).argsort(-1)
    return ranked.gather(-1, at), n - counts[..., 0]


class CachePolicy:
    """One cache method with its budget, applied to the layers of whatever cache arrives.

    Args:
        layers: the decoder layers that it acts on.
        total: number of decoder layers.
    """

    def __init__(self, method: CacheMethod, ratio: Fraction | None, keep: int | None, layers: list[int], total: int):
        self.method, self.ratio, self.keep, self.layers, self.total = method, ratio, keep, layers, total
        self.store = None if ratio == 0 else method.packing()
        self.entries = method.entry_ratio(ratio) if method.evicts else Fraction(0)
        self._group = {group[-1]: group for group in method.groups(layers)}

    @torch.no_grad()
    def after_prompt(
        self, cache: Any, layer: int, prompt: Layout, record: Record | None, rotary: Rotary | None
    ) -> None:
        """Evict and pack at the end of the prompt; attention has used all keys and values of this pass."""
        if self.ratio == 0:
            return
        held: HeldLayer = cache.layers[layer]
        lengths = prompt.derive("rows", lambda: prompt.valid.sum(-1))
        view = StoredView(held, layer, self.total, lengths, prompt, record, rotary)
        if self.method.evicts:
            self._evict(held, view, lengths)
        if self.store is not None:
            held.view = view
            group = self._group.get(layer, ())
            if group:
                layers = [cache.layers[i] for i in group]
                views = [layer.view for layer in layers]
                for layer_ in layers:
                    layer_.view = None
                self.store.settle(layers, views)

    def _evict(self, held: HeldLayer, view: StoredView, lengths: Tensor) -> None:
        method, outside = self.method, self.method.outside(view)
        fixed = 0 if outside is None else (outside & view.valid).sum(-1).amax(1)
        mean = entries(lengths - fixed, self.entries, self.keep)
        counts = method.layer_budget(mean, lengths - fixed, view.layer, self.total) + fixed
        always = method.protected(view)
        if always is not None:
            counts = torch.maximum(counts, (always & view.valid).sum(-1).amax(1))
        view.budget = counts[:, None, None]
        held.budget = counts
        if method.running:
            view.scores = method.begin(view)
            held.scores = view.scores if method.policy == "hold" else None
        counts = torch.minimum(counts, lengths)
        if not bool((counts < lengths).any()):
            return
        score = method.score(view)
        for mask in (outside, always):
            score = score if mask is None else score.masked_fill(mask, torch.inf)
        counts = method.head_budget(score, view.valid, counts)
        slots, fillers = best_slots(score, view.valid, counts)
        held.budget = held.budget if counts.ndim == 1 else counts
        n = slots.shape[-1]
        real = None if fillers is None else torch.arange(n, device=slots.device) >= fillers[..., None]
        held.select(slots, fillers, method.merge(view, slots, real))
        if counts.ndim == 2:
            lists = counts.tolist()
            held.pack(Ragged.of(held.keys, lists), Ragged.of(held.values, lists))

    @torch.no_grad()
    def before_step(self, held: HeldLayer, layer: int) -> None:
        """Make room for the next token, so that a held cache returns to its budget with it; pack what is due."""
        if held.layout is None:
            return
        if self.store is not None:
            self.store.settle([held], None)
        if self.method.policy != "hold" or held.budget is None:
            return
        room = held.budget - 1
        if int(room.max()) < len(held.layout):
            view = StoredView(held, layer, self.total, held.budget)
            have = view.valid.sum(-1)
            counts = torch.minimum(room, have.amax(1) if room.ndim == 1 else have)
            slots, fillers = best_slots(self.method.score(view), view.valid, counts)
            held.select(slots, fillers)
            if counts.ndim == 2:
                lists = counts.tolist()
                held.pack(Ragged.of(held.keys, lists), Ragged.of(held.values, lists))

    @torch.no_grad()
    def after_step(self, held: HeldLayer, queries: Layout, record: Record) -> None:
        """Add the attention of the newest rows to a running score."""
        if held.scores is None or held.layout is None:
            return
        query, _, scaling = record
        a = rows_attention(query, held.whole()[0], scaling, visible(held.layout, queries, held.window, None))
        new = (a * queries.valid[:, None, :, None]).sum(2)
        held.scores = self.method.advance(held.scores, group_mean(new, held.scores.shape[1]))
