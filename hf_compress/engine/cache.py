"""The cache stage: score, budget, evict; at the end of the prompt, and while decoding where the policy says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.engine.masks import visible
from hf_compress.layout import Layout, small
from hf_compress.methods.base import CacheMethod
from hf_compress.stores import HeldLayer, Ragged
from hf_compress.stores.kivi import KiviStore
from hf_compress.stores.shared import check_same_rows
from hf_compress.tensors.attention import Record, column_sums, group_mean, rows_attention
from hf_compress.tensors.select import CERTAIN, adaptive


@dataclass
class Rows:
    """The entries of one layer as each of several new rows finds them, were it alone: an `Order`."""

    depth: int
    depths: int
    valid: Tensor  # (B, 1 or Hkv, 1, S)
    order: Tensor  # (B, 1 or Hkv, 1, S)
    lengths: Tensor  # (B, 1 or Hkv, q, 1), entries before each row
    budget: Tensor  # (B, 1 or Hkv, 1, 1)
    cursor: Tensor | None  # (B, 1, 1, 1)
    incoming: int = 1  # the row itself


class StoredView:
    """The entries of one layer: the `CacheView` that a method sees.

    Args:
        prompt: the layout of the prompt while it is still whole, and `record` its (query, key, scaling); both None
            while decoding.
        rotary: cos and sin of the prompt's rows, and `rotate` the function of the model that applies them.
        place: how many of the layers that the method acts on come before this one, and how many there are.
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
        place: tuple[int, int] = (0, 1),
    ):
        assert held.layout is not None
        self._held, self._prompt, self._record, self._rotary = held, prompt, record, rotary
        self.layer, self.layers = layer, layers
        self.depth, self.depths = place
        self.budget = budget.view(len(budget), -1, 1)
        self.incoming = int(prompt is None)
        self.keys, self.values = held.whole()
        self.scores, self.votes = held.scores, held.votes
        self.cursor = None if held.cursor is None else held.cursor[:, None, None]
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

    @property
    def rotation(self) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        if self._rotary is None:
            raise RuntimeError("rotations can be read at the end of the prompt only")
        return self._rotary.cos, self._rotary.sin, functools.partial(turn, self._rotary.function)

    def future_rotation(self, count: int) -> Tensor:
        if self._rotary is None:
            raise RuntimeError("rotations can be foreseen at the end of the prompt only")
        return self._rotary.ahead(count, self.keys.shape[-1]).to(self.keys.device)

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
        some = weight is not None
        weight = prompt.valid.float() if weight is None else weight * prompt.valid
        rows, voting, at = prompt, weight, None
        if some and (n := int(weight.ne(0).sum(1).max())) < len(prompt):  # what counts in no sample is not computed
            at = weight.ne(0).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]
            query = query.gather(2, at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1]))
            rows, voting = prompt.gather(at), weight.gather(1, at)
        sight = Sight(prompt, rows, self._held.window, at)
        sums = column_sums(query, self.keys, scaling, sight, voting, sight.ends)
        if not normalize:
            return sums
        after = weight.flip(1).cumsum(1).flip(1)[:, None]  # an entry is seen by itself and every later row
        return sums / after.clamp(min=torch.finfo(torch.float32).tiny)


class Rotary:
    """Rotations of the rows of a prompt: cos and sin (B or 1, S, d'), and the model's function that applies them.

    Where only the first d' channels of a head turn, the others pass as they are.

    Args:
        ahead: count -> mean cos and sin (B or 1, 1, d') of so many positions after the prompt, fp32.
    """

    def __init__(
        self,
        tables: tuple[Tensor, Tensor],
        function: Callable[..., tuple[Tensor, Tensor]],
        ahead: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    ):
        self.cos, self.sin, self.function, self._ahead = *tables, function, ahead

    def apply(self, x: Tensor) -> Tensor:
        """Rotated (B, H, S, d)."""
        return turn(self.function, x, self.cos, self.sin)

    def back(self, x: Tensor) -> Tensor:
        """The same before its rotation; tables may carry a factor (YaRN)."""
        scale = (self.cos.float().square() + self.sin.float().square()).mean().to(x.dtype)
        return turn(self.function, x, self.cos / scale, -self.sin / scale)

    def newest(self, rows: int) -> Rotary:
        """Of the newest rows alone."""
        return Rotary((self.cos[:, -rows:], self.sin[:, -rows:]), self.function)

    def ahead(self, count: int, size: int) -> Tensor:
        """(B or 1, size, size) fp32: the mean rotation of the next `count` positions; rows of vectors times it."""
        if self._ahead is None:
            raise RuntimeError("rotations after the prompt are not known here")
        cos, sin = (t.expand(-1, size, -1) for t in self._ahead(count))
        basis = torch.eye(size, device=cos.device).expand(len(cos), 1, -1, -1)
        return Rotary((cos, sin), self.function).apply(basis)[:, 0]  # linear in cos and sin, so of their means too


def turn(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, S, d) turned by the model's `function` in the channels that the tables have."""
    d = cos.shape[-1]
    turned = function(x[:, :1, :, :d], x[..., :d], cos, sin)[1]  # two at once, queries and keys alike: here one head
    return turned if d == x.shape[-1] else torch.cat([turned, x[..., d:]], -1)


class Sight:
    """What rows of a layer see of its keys, block by block: arguments of `column_sums`.

    Args:
        rows: the newest slots of `keys`, or those at the slots `at` (B, q).

    Attributes:
        ends: of every row, how many keys stand up to its own.
    """

    def __init__(self, keys: Layout, rows: Layout, window: int | None, at: Tensor | None = None):
        S, q = len(keys), len(rows)
        self.keys, self.rows, self.window = keys, rows, window
        self.ends = list(range(S - q + 1, S + 1)) if at is None else (at.amax(0) + 1).tolist()
        starts = self.ends if at is None else (at.amin(0) + 1).tolist()
        if not (keys.all_valid and window is None) or keys.per_head:  # else a row sees everything before itself
            starts = [0] * q
        if keys.per_head:
            self.ends = [S] * q
        self._starts = starts

    def __call__(self, part: slice) -> Tensor:
        """(B, 1 or Hkv, rows, m) bool, of the newest m of the keys that the rows reach; they see all older ones."""
        stop, start = max(self.ends[part]), min(self._starts[part])
        keys = self.keys if stop == len(self.keys) else self.keys.crop(len(self.keys) - stop)
        if start:
            keys = keys.tail(stop - start + 1)
        if len(self.rows) == 1:
            return visible(keys, self.rows, self.window, None)
        at = torch.arange(len(self.rows), device=self.rows.device)[part].expand(len(self.rows.valid), -1)
        return visible(keys, self.rows.gather(at), self.window, None)


def _newest(prompt: Layout, rows: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The newest rows[b] valid rows of each sample: (B, w) indices, which of them are real, what they see."""
    newest = prompt.valid.long().flip(1).cumsum(1).flip(1)  # 1 on the newest valid row, 2 on the one before ...
    inside = prompt.valid & (newest <= rows[:, None])
    at = inside.long().argsort(dim=1, stable=True)[:, -int(rows.max()) :]  # short rows are filled up in front
    return at, inside.gather(1, at)[:, None, :, None], visible(prompt, prompt.gather(at), window, None)


def _per_row(cursor: Tensor | None) -> Tensor | None:
    return None if cursor is None else cursor[:, 0, 0]


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


def protect(score: Tensor, *masks: Tensor | None) -> Tensor:
    """The score with the entries of the `masks` above all others, those that the method itself protects included."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return score
    return score.clamp(max=CERTAIN).masked_fill(functools.reduce(torch.logical_or, given), torch.inf)


class CachePolicy:
    """One cache method with its budget, applied to the layers of whatever cache arrives.

    Args:
        layers: the decoder layers that it acts on.
        total: number of decoder layers.
    """

    def __init__(self, method: CacheMethod, ratio: Fraction | None, keep: int | None, layers: list[int], total: int):
        self.method, self.ratio, self.keep, self.layers, self.total = method, ratio, keep, layers, total
        self._group = {group[-1]: group for group in method.groups(layers)}
        self._place = {layer: (i, len(layers)) for i, layer in enumerate(layers)}
        self.store = None if ratio == 0 else method.packing()

    @torch.no_grad()
    def after_prompt(
        self,
        cache: Any,
        layer: int,
        prompt: Layout,
        record: Record | None,
        rotary: Rotary | None,
        heads: Tensor | None = None,
    ) -> None:
        """Evict and pack at the end of the prompt; attention has used all keys and values of this pass.

        `heads` (B, Hkv) are the entries of each head, where they are settled for all layers together.
        """
        if self.ratio == 0:
            return
        held: HeldLayer = cache.layers[layer]
        lengths = prompt.derive("rows", lambda: prompt.valid.sum(-1))
        view = StoredView(held, layer, self.total, lengths, prompt, record, rotary, self._place[layer])
        if self.method.relative:
            assert rotary is not None
            held.unturn(rotary)
        if self.method.evicts:
            self._evict(held, view, lengths, heads)
        if self.store is not None:
            held.view = view
            group = self._group.get(layer, ())
            if group:
                layers = [cache.layers[i] for i in group]
                views = [layer.view for layer in layers]
                for layer_ in layers:
                    layer_.view = None
                self.store.settle(layers, views)

    @torch.no_grad()
    def after_passes(self, cache: Any, scores: dict[int, Tensor]) -> None:
        """Evict the prompt in all layers, when further forwards have scored the entries of each, (B, Hkv, S)."""
        for i, score in scores.items():
            cache.layers[i].scores = score
        heads = self._pool([cache.layers[i] for i in scores]) if self.method.pooled else [None] * len(scores)
        for i, counts in zip(scores, heads):
            held: HeldLayer = cache.layers[i]
            assert held.layout is not None
            self.after_prompt(cache, i, held.layout, None, None, counts)
            held.scores = None

    def _pool(self, held: list[HeldLayer]) -> list[Tensor]:
        """(B, Hkv) entries of every head of each layer, where all of them share one budget by one ranking."""
        check_same_rows(held)
        method, home, ranked = self.method, held[0].keys.device, []
        for i, layer in zip(self.layers, held):
            assert layer.layout is not None
            lengths = layer.layout.valid.sum(-1)
            view = StoredView(layer, i, self.total, lengths, layer.layout)
            outside, always = method.outside(view), method.protected(view)
            ranked.append(protect(method.score(view), outside, always).to(home))
        # the layers hold the same rows: what the last one says of them holds for all
        fixed = 0 if outside is None else (outside & view.valid).sum(-1).amax(1)
        budget = self._mean(held[0], lengths, fixed) + fixed
        if always is not None:
            budget = torch.maximum(budget, (always & view.valid).sum(-1).amax(1))
        counts = adaptive(torch.cat(ranked, 1), view.valid.to(home), budget.to(home), 0.0)
        parts = counts.split([layer.keys.shape[1] for layer in held], 1)
        return [part.to(layer.keys.device) for part, layer in zip(parts, held)]

    def _mean(self, held: HeldLayer, lengths: Tensor, fixed: Tensor | int) -> Tensor:
        """(B,) entries per head that stay of those that the ratio applies to, all but `fixed` of each row."""
        among = lengths - fixed
        if self.ratio is None or not isinstance(self.store, KiviStore):
            return entries(among, self.ratio, self.keep)
        assert held.layout is not None
        sizes, index = (held.keys.shape[3], held.values.shape[3]), small(len(held.layout)).itemsize
        rows = zip(among.tolist(), (lengths - among).tolist())
        counts = [self.store.entries(n, 1 - self.ratio, sizes, index, outside) for n, outside in rows]
        return torch.tensor(counts, device=lengths.device)

    def _evict(self, held: HeldLayer, view: StoredView, lengths: Tensor, heads: Tensor | None = None) -> None:
        method, outside = self.method, self.method.outside(view)
        fixed = 0 if outside is None else (outside & view.valid).sum(-1).amax(1)
        mean = self._mean(held, lengths, fixed)
        counts = method.layer_budget(mean, lengths - fixed, view.layer, self.total) + fixed
        view.budget = counts[:, None, None]
        always = method.protected(view)
        if always is not None:
            counts = torch.maximum(counts, (always & view.valid).sum(-1).amax(1))
        view.budget = counts[:, None, None]
        held.budget = counts
        if method.running:
            view.scores, view.votes = method.begin(view), method.votes(view)
            if method.policy == "hold":
                held.scores, held.votes = view.scores, view.votes
        counts = method.fit(view, counts, lengths)
        if not bool((counts < lengths).any()):
            return
        score = protect(method.score(view), outside, always)
        counts = method.head_budget(score, view.valid, counts) if heads is None else heads
        slots, fillers = best_slots(score, view.valid, counts)
        if counts.ndim == 2:  # a row shorter than its budget has room left
            held.budget = counts + (held.budget - lengths).clamp(min=0)[:, None]
        n = slots.shape[-1]
        real = None if fillers is None else torch.arange(n, device=slots.device) >= fillers[..., None]
        held.select(slots, fillers, method.merge(view, slots, real))
        held.cursor = _per_row(method.cursor(view))
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
        if int(room.min()) < len(held.layout):
            view = StoredView(held, layer, self.total, held.budget, place=self._place[layer])
            have, masks = view.valid.sum(-1), (self.method.outside(view), self.method.protected(view))
            score = protect(self.method.score(view), *masks)
            if any(mask is not None for mask in masks):
                sure = (score.isposinf() & view.valid).sum(-1)
                room = torch.maximum(room, sure.amax(1) if room.ndim == 1 else sure)
            have = have.amax(1) if room.ndim == 1 else have
            counts = self.method.fit(view, room, have)
            if not bool((counts < have).any()):
                return
            slots, fillers = best_slots(score, view.valid, counts)
            held.select(slots, fillers)
            held.cursor = _per_row(self.method.cursor(view))
            if counts.ndim == 2:
                lists = counts.tolist()
                held.pack(Ragged.of(held.keys, lists), Ragged.of(held.values, lists))

    def sight(self, held: HeldLayer, layer: int, keys: Layout, new: int) -> Tensor | None:
        """(B, 1 or Hkv, new, S) bool: what each of the newest slots of `keys` may see of it, None where it is all."""
        if self.method.policy != "hold" or held.budget is None or new == 1:
            return None
        valid = keys.valid if keys.valid.ndim == 3 else keys.valid[:, None]
        order = valid.long().cumsum(-1) - 1
        budget = held.budget.view(len(held.budget), -1, 1, 1)
        cursor = None if held.cursor is None else held.cursor.view(-1, 1, 1, 1)
        before = order[..., -new:, None]
        return self.method.keeps(
            Rows(*self._place[layer], valid[:, :, None], order[:, :, None], before, budget, cursor)
        )

    @torch.no_grad()
    def after_step(self, held: HeldLayer, queries: Layout, record: Record) -> None:
        """Add the attention of the newest rows to a running score: s <- decay * s + new, row by row."""
        if held.scores is None or held.layout is None:
            return
        voters = self.method.voting_rows(held.keys.shape[2], len(queries))
        if not any(voters):
            return
        query, key, scaling = record
        after = queries.valid.long().flip(1).cumsum(1).flip(1)  # of each row: valid rows from itself on
        weight = self.method.decay ** (after - 1).clamp(min=0).float() * queries.valid
        weight = weight * torch.tensor(voters, device=weight.device)
        old = held.scores * self.method.decay ** after[:, :1, None].float()
        key = held.whole()[0] if held.in_place else key  # what was unpacked for the attention is still there
        sight = Sight(held.layout, queries, held.window)
        new = column_sums(query, key, scaling, sight, weight, sight.ends)
        held.scores = self.method.advance(old, new[..., new.shape[-1] - old.shape[-1] :])
        if held.votes is not None:  # a row counts on the entries before it and on itself
            older = after[:, :1].expand(-1, held.votes.shape[-1] - len(queries))
            held.votes = held.votes + torch.cat([older, after], 1)[:, None]
