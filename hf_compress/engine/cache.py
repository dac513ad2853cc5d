"""The cache stage: score, budget, evict; at the end of the prompt, and while decoding where the policy says so."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.engine.attention import Call
from hf_compress.engine.entries import Rows, Sight, StoredView, in_order
from hf_compress.engine.masks import visible
from hf_compress.engine.rotary import Rotary
from hf_compress.layout import Layout, small
from hf_compress.methods.base import CacheMethod
from hf_compress.signals import COLUMNS, Rivals
from hf_compress.stores import HeldLayer, Ragged
from hf_compress.stores.kivi import KiviStore
from hf_compress.stores.shared import check_same_rows
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.attention import Record, attention_and_sums, column_sums, group_mean
from hf_compress.tensors.select import CERTAIN, adaptive


def _per_row(cursor: Tensor | int | None) -> Tensor | int | None:
    """(B,), or the one number of all rows."""
    if cursor is None or isinstance(cursor, int):
        return cursor
    rows = cursor[:, 0, 0]
    return int(rows[0]) if bool((rows == rows[0]).all()) else rows


def _lengths(prompt: Layout) -> Tensor:
    """(B,) on the host, where counts are settled: whoever asks a device waits for all that it still has to do."""
    if prompt.all_valid:
        return torch.full((len(prompt.removed),), len(prompt))
    return prompt.valid.sum(-1).cpu()


def _onto(device: torch.device, counts: Tensor) -> Tensor:
    """Counts of the host on a device, without waiting for it."""
    return counts.to(device, non_blocking=True)


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
    counts = _onto(score.device, counts)
    real = torch.arange(n, device=score.device) < counts
    # slots that only fill up go in front, so that real ones stay the newest
    at = torch.where(real, ranked, ranked - score.shape[-1]).argsort(-1)
    return ranked.gather(-1, at), n - counts[..., 0]


def worst_slot(score: Tensor, order: Tensor) -> Tensor:
    """(B, Hkv, 1): the slot of every head with the lowest score; of equal ones the youngest goes."""
    return order.masked_fill(score > score.amin(-1, keepdim=True), -1).argmax(-1, keepdim=True)


def _outlive(held: HeldLayer, rivals: Rivals, method: CacheMethod) -> tuple[Tensor, Tensor]:
    """(B, 1 or Hkv, 1): the slot of the rival that goes; (B, 1 or Hkv, S): all from the oldest to the newest then."""
    (B, H, S), first = held.keys.shape[:3], rivals.first
    ages = held.ages
    if ages is None:
        ages = in_order(B, S, held.keys.device)[1].expand(-1, H if rivals.pair else 1, -1)
    if not rivals.pair:
        slot = ages[..., first : first + 1]
        return slot, torch.cat([ages[..., :first], ages[..., first + 1 :], slot], -1)
    assert held.scores is not None
    pair = ages[..., first : first + 2]
    votes = None if held.votes is None else held.votes.gather(2, pair)
    older_goes = method.older_goes(held.scores.gather(2, pair), votes)
    older, younger = pair.split(1, -1)
    slot, stays = torch.where(older_goes, older, younger), torch.where(older_goes, younger, older)
    return slot, torch.cat([ages[..., :first], stays, ages[..., first + 2 :], slot], -1)


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
        self.sums = COLUMNS in method.reads(total)
        self.store = None if ratio == 0 else method.packing()

    @torch.no_grad()
    @own_precision
    def after_prompt(
        self,
        cache: Any,
        layer: int,
        prompt: Layout,
        record: Record | None,
        rotary: Rotary | None,
        heads: Tensor | None = None,
        content: Tensor | None = None,
    ) -> None:
        """Evict and pack at the end of the prompt; attention has used all keys and values of this pass.

        `heads` (B, Hkv) are the entries of each head, where they are settled for all layers together.
        """
        if self.ratio == 0:
            return
        held: HeldLayer = cache.layers[layer]
        lengths = prompt.derive("rows", lambda: _lengths(prompt))
        here = _onto(held.keys.device, lengths)
        view = StoredView(held, layer, self.total, here, prompt, record, rotary, self._place[layer], content)
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
    @own_precision
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
        """(B,) entries per head that stay of those that the ratio applies to, all but `fixed` of each of `lengths`."""
        among = lengths - fixed
        if self.ratio is None or not isinstance(self.store, KiviStore):
            return entries(among, self.ratio, self.keep)
        assert held.layout is not None
        sizes, index = (held.keys.shape[3], held.values.shape[3]), small(len(held.layout)).itemsize
        rows = zip(among.tolist(), (lengths - among).tolist())
        counts = [self.store.entries(n, 1 - self.ratio, sizes, index, outside) for n, outside in rows]
        return torch.tensor(counts, device=lengths.device)

    def _evict(self, held: HeldLayer, view: StoredView, lengths: Tensor, heads: Tensor | None = None) -> None:
        method, outside, home = self.method, self.method.outside(view), view.valid.device
        fixed = 0 if outside is None else (outside & view.valid).sum(-1).amax(1).cpu()
        mean = self._mean(held, lengths, fixed)
        counts = method.layer_budget(mean, lengths - fixed, view.layer, self.total) + fixed
        view.budget = _onto(home, counts)[:, None, None]
        always = method.protected(view)
        if always is not None:
            counts = torch.maximum(counts, (always & view.valid).sum(-1).amax(1).cpu())
            view.budget = _onto(home, counts)[:, None, None]
        wanted = counts
        held.set_budget(wanted)
        if method.running:
            view.scores, view.votes = method.begin(view), method.votes(view)
            if method.policy == "hold":
                held.scores, held.votes = view.scores, view.votes
        counts = method.fit(view, counts, lengths)
        if not bool((counts < lengths).any()):
            return
        score = protect(method.score(view), outside, always)
        each = _onto(home, counts)
        heads = method.head_budget(score, view.valid, each) if heads is None else heads
        counts = counts if heads is each else heads.cpu()
        slots, fillers = best_slots(score, view.valid, counts)
        if counts.ndim == 2:  # a row shorter than its budget has room left
            held.set_budget(counts + (wanted - lengths).clamp(min=0)[:, None])
        n = slots.shape[-1]
        real = None if fillers is None else torch.arange(n, device=slots.device) >= fillers[..., None]
        held.select(slots, fillers, method.merge(view, slots, real))
        self._settled(held, view, counts)

    def _settled(self, held: HeldLayer, view: StoredView, counts: Tensor) -> None:
        """After a choice: where the next one goes on, and heads of different length end to end."""
        held.cursor = _per_row(self.method.cursor(view))
        if counts.ndim == 2:
            lists = counts.tolist()
            held.pack(Ragged.of(held.keys, lists), Ragged.of(held.values, lists))

    @torch.no_grad()
    @own_precision
    def before_step(self, held: HeldLayer, layer: int, alone: bool = False) -> None:
        """Make room for the next token, so that a held cache returns to its budget with it; pack what is due.

        `alone`: it is the only one, and nobody asks in which order it sees the entries.
        """
        if held.layout is None:
            return
        if self.store is not None:
            self.store.settle([held], None)
        if self.method.policy != "hold" or held.budget is None:
            return
        full = held.replaceable and held.least == held.most == len(held.layout)
        if alone and full and self._replace(held, layer):
            return
        held.line_up()
        if held.least <= len(held.layout):
            self._shrink(held, StoredView(held, layer, self.total, held.budget, place=self._place[layer]))

    def _replace(self, held: HeldLayer, layer: int) -> bool:
        """Give the next token the slot of the one entry that goes from a full cache, if the method finds it so."""
        method, place = self.method, self._place[layer]
        if not torch.is_tensor(held.cursor) and (rivals := method.rivals(held.most, held.cursor, *place)) is not None:
            slot, ages = _outlive(held, rivals, method)
            held.replace(slot, ages)
            held.cursor = rivals.cursor
            return True
        if not method.unordered:
            return False
        view = StoredView(held, layer, self.total, held.most, place=place)
        if method.outside(view) is not None or method.protected(view) is not None:
            return False
        held.replace(worst_slot(method.score(view), view.order))
        return True

    def _shrink(self, held: HeldLayer, view: StoredView) -> None:
        """Evict all that is too much once the next token has come."""
        assert held.budget is not None
        masks = [m for m in (self.method.outside(view), self.method.protected(view)) if m is not None]
        score, counts, have = None, held.budget - 1, view.lengths[..., 0]
        if masks:
            score = protect(self.method.score(view), *masks)
            sure = (score.isposinf() & view.valid).sum(-1)
            counts = torch.maximum(counts, sure.amax(1) if counts.ndim == 1 else sure)
        have = have.amax(1) if counts.ndim == 1 else have
        counts = self.method.fit(view, counts, have)
        if not bool((counts < have).any()):
            return
        slots, fillers = best_slots(self.method.score(view) if score is None else score, view.valid, counts)
        held.select(slots, fillers, room=1)
        self._settled(held, view, counts)

    @own_precision
    def sight(self, held: HeldLayer, layer: int, keys: Layout, new: int) -> Tensor | None:
        """(B, 1 or Hkv, new, S) bool: what each of the newest slots of `keys` may see of it, None where it is all."""
        if self.method.policy != "hold" or held.budget is None or new == 1:
            return None
        valid = keys.valid if keys.valid.ndim == 3 else keys.valid[:, None]
        order = valid.long().cumsum(-1) - 1
        budget = held.budget.view(len(held.budget), -1, 1, 1)
        cursor = held.cursor.view(-1, 1, 1, 1) if torch.is_tensor(held.cursor) else held.cursor
        before = order[..., -new:, None]
        return self.method.keeps(
            Rows(*self._place[layer], valid[:, :, None], order[:, :, None], before, budget, cursor)
        )

    @own_precision
    def attend(self, held: HeldLayer, queries: Layout, call: Call) -> Tensor | None:
        """(B, q, Hq, d) attention that counts in a score, which is then read only once; None: the kernel's turn.

        That is the attention of a single row while a score is running, and of a whole prompt whose sums are asked for.
        """
        if held.layout is None or held.body or not held.direct:
            return None
        if held.scores is not None and len(queries) == 1:
            see = None if held.layout.all_valid else visible(held.layout, queries, held.window, None)
            return held.attend_row(call.query, call.key, call.scaling, see)
        whole = len(queries) == len(held.layout) and self.sums and self.ratio != 0
        learns, exact = torch.is_grad_enabled() and call.query.requires_grad, call.query.dtype == torch.float64
        if not whole or learns or exact or call.query.device.type != "cpu":  # elsewhere kernels beat blocks of rows
            return None
        sight = Sight(queries, queries, held.window)
        out, held.sums = attention_and_sums(*call, sight, queries.valid.float(), sight.ends)
        return out

    @torch.no_grad()
    @own_precision
    def after_step(self, held: HeldLayer, queries: Layout, record: Record) -> None:
        """Add the attention of the newest rows to a running score: s <- decay * s + new, row by row."""
        row, held.row = held.row, None
        if held.scores is None or held.layout is None:
            return
        voters = self.method.voting_rows(held.keys.shape[2], len(queries))
        if not any(voters):
            return
        query, key, scaling = record
        if row is not None and queries.all_valid:  # one row, which counts in full on all entries
            new, decay = group_mean(row[:, :, 0], key.shape[1])[..., -held.scores.shape[-1] :], self.method.decay
            held.scores = self.method.advance(held.scores * decay if decay != 1 else held.scores, new)
            held.votes = None if held.votes is None else held.votes + 1
            return
        weight, after = queries.derive(("votes", tuple(voters)), lambda: _votes(queries, voters, self.method.decay))
        old = held.scores * self.method.decay ** after[:, :1, None].float() if self.method.decay != 1 else held.scores
        key = held.whole()[0] if held.in_place else key  # what was unpacked for the attention is still there
        if row is not None:
            new = group_mean(row[:, :, 0], key.shape[1]) * weight[..., None]
        else:
            sight = Sight(held.layout, queries, held.window)
            new = column_sums(query, key, scaling, sight, weight, sight.ends)
        held.scores = self.method.advance(old, new[..., new.shape[-1] - old.shape[-1] :])
        if held.votes is not None:  # a row counts on the entries before it and on itself
            older = after[:, :1].expand(-1, held.votes.shape[-1] - len(queries))
            held.votes = held.votes + torch.cat([older, after], 1)[:, None]


def _votes(queries: Layout, voters: list[bool], decay: float) -> tuple[Tensor, Tensor]:
    """(B, q) each: how much each new row counts, and how many valid rows there are from it on."""
    after = queries.valid.long().flip(1).cumsum(1).flip(1)
    weight = decay ** (after - 1).clamp(min=0).float() * queries.valid
    return weight * torch.tensor(voters, device=weight.device), after
