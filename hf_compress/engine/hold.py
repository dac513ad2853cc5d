"""The cache stage while decoding: a cache that is held at its budget, scores that run on, packing of what is due."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_compress.engine.attention import Call
from hf_compress.engine.entries import Rows, Sight, StoredView, in_order
from hf_compress.engine.masks import visible
from hf_compress.engine.trained import Module, untrained
from hf_compress.layout import Layout
from hf_compress.methods.base import CacheMethod
from hf_compress.methods.holding import Holding
from hf_compress.signals import Rivals
from hf_compress.stores import HeldLayer
from hf_compress.stores.quota import Quota
from hf_compress.stores.store import Store
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.attention import Record, column_sums, group_mean, rows_attention
from hf_compress.tensors.select import best_slots, protect, worst_slot


class Steps:
    """What one cache method does in the forwards behind the prompt.

    Args:
        place: of each layer that it acts on, how many of these come before it and how many there are.
        total: number of decoder layers.
        module: gives what the method trains, as it is now.

    Attributes:
        holding: what keeps the cache at its budget; None: it grows.
    """

    def __init__(
        self,
        method: CacheMethod,
        store: Store | None,
        place: dict[int, tuple[int, int]],
        total: int,
        module: Module = untrained,
    ):
        self.method, self.store, self._place, self.total, self.module = method, store, place, total, module
        self.holding: Holding | None = method.holding() if method.policy == "hold" else None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do before a forward."""
        return self.store is None and self.holding is None

    @property
    def running(self) -> bool:
        """Whether attention is read at every step."""
        return self.holding is not None and self.holding.running

    @property
    def stepwise(self) -> bool:
        """Whether tokens fed together find another cache than one by one."""
        if self.holding is not None:
            return self.holding.stepwise
        return self.store is not None and self.store.continues

    @torch.no_grad()
    @own_precision
    def before(self, held: HeldLayer, layer: int, alone: bool = False) -> None:
        """Make room for the next token, so that a held cache returns to its budget with it; pack what is due.

        `alone`: it is the only one, and nobody asks in which order it sees the entries.
        """
        if held.layout is None:
            return
        if self.store is not None:
            self.store.settle([held], None)
        quota = held.quota
        if self.holding is None or quota is None:
            return
        full = held.replaceable and quota.least == quota.most == len(held.layout)
        if alone and full and self._replace(held, layer, self.holding, quota):
            return
        held.line_up()
        if quota.least <= len(held.layout):
            view = StoredView(held, layer, self.total, quota.budget, place=self._place[layer], module=self.module)
            self._shrink(held, view, self.holding, quota.budget)

    def _replace(self, held: HeldLayer, layer: int, holding: Holding, quota: Quota) -> bool:
        """Give the next token the slot of the one entry that goes from a full cache, if the method finds it so."""
        place, cursor = self._place[layer], quota.cursor
        if not torch.is_tensor(cursor) and (rivals := holding.rivals(quota.most, cursor, *place)) is not None:
            slot, ages = _outlive(held, rivals, holding, quota.ages)
            held.replace(slot, replace(quota, in_order=False, ages=ages, cursor=rivals.cursor))
            return True
        if not holding.any_order:
            return False
        view = StoredView(held, layer, self.total, quota.most, place=place, module=self.module)
        if self.method.outside(view) is not None or self.method.protected(view) is not None:
            return False
        held.replace(worst_slot(self.method.score(view), view.order), replace(quota, in_order=False, ages=None))
        return True

    def _shrink(self, held: HeldLayer, view: StoredView, holding: Holding, budget: Tensor) -> None:
        """Evict all that is too much once the next token has come."""
        masks = [m for m in (self.method.outside(view), self.method.protected(view)) if m is not None]
        score, counts, have = None, budget - 1, view.lengths[..., 0]
        if masks:
            score = protect(self.method.score(view), *masks)
            sure = (score.isposinf() & view.valid).sum(-1)
            counts = torch.maximum(counts, sure.amax(1) if counts.ndim == 1 else sure)
        have = have.amax(1) if counts.ndim == 1 else have
        counts = holding.fit(view, counts, have)
        if not bool((counts < have).any()):
            return
        slots, fillers = best_slots(self.method.score(view) if score is None else score, view.valid, counts)
        held.select(slots, fillers, room=1)
        held.settle(counts, holding.cursor(view))

    @own_precision
    def sight(self, held: HeldLayer, layer: int, keys: Layout, new: int) -> Tensor | None:
        """(B, 1 or Hkv, new, S) bool: what each of the newest slots of `keys` may see of it, None where it is all."""
        if self.holding is None or held.quota is None or new == 1:
            return None
        valid = keys.valid if keys.valid.ndim == 3 else keys.valid[:, None]
        order = valid.long().cumsum(-1) - 1
        budget, cursor = held.quota.budget.view(len(valid), -1, 1, 1), held.quota.cursor
        cursor = cursor.view(-1, 1, 1, 1) if torch.is_tensor(cursor) else cursor
        before = order[..., -new:, None]
        rows = Rows(*self._place[layer], valid[:, :, None], order[:, :, None], before, budget, cursor)
        return self.holding.keeps(rows)

    def attend(self, held: HeldLayer, queries: Layout, call: Call) -> tuple[Tensor, Tensor]:
        """(B, 1, Hq, d) attention of a single row that counts in a running score, and its weights (B, Hq, 1, S)."""
        assert held.layout is not None
        see = None if held.layout.all_valid else visible(held.layout, queries, held.window, None)
        row = rows_attention(call.query, call.key, call.scaling, see)
        B, Hq, _, S = row.shape
        weights = row.view(B, call.key.shape[1], -1, S).to(call.value.dtype)
        return (weights @ call.value).view(B, 1, Hq, -1), row

    @torch.no_grad()
    @own_precision
    def after(self, held: HeldLayer, queries: Layout, record: Record, row: Tensor | None = None) -> None:
        """Add the attention of the newest rows to a running score: s <- decay * s + new, row by row.

        `row` (B, Hq, 1, S) is that of a single one, where `attend` gave it.
        """
        scores = held.side.get("scores")
        if scores is None or held.layout is None or self.holding is None:
            return
        voters = self.holding.voting_rows(held.keys.shape[2], len(queries))
        if not any(voters):
            return
        (query, key, scaling), decay, votes = record, self.holding.decay, held.side.get("votes")
        if row is not None and queries.all_valid:  # one row, which counts in full on all entries
            new = group_mean(row[:, :, 0], key.shape[1])
            old = scores * decay if decay != 1 else scores
            votes = None if votes is None else votes + 1
        else:
            weight, after = queries.derive(("votes", tuple(voters)), lambda: _votes(queries, voters, decay))
            old = scores * decay ** after[:, :1, None].float() if decay != 1 else scores
            key = held.whole()[0] if held.in_place else key  # what was unpacked for the attention is still there
            if row is not None:
                new = group_mean(row[:, :, 0], key.shape[1]) * weight[..., None]
            else:
                sight = Sight(held.layout, queries, held.window)
                new = column_sums(query, key, scaling, sight, weight, sight.ends)
            if votes is not None:  # a row counts on the entries before it and on itself
                older = after[:, :1].expand(-1, votes.shape[-1] - len(queries))
                votes = votes + torch.cat([older, after], 1)[:, None]
        scores = self.holding.advance(old, new[..., new.shape[-1] - old.shape[-1] :])
        held.side = held.side | {"scores": scores} | ({} if votes is None else {"votes": votes})


def _votes(queries: Layout, voters: list[bool], decay: float) -> tuple[Tensor, Tensor]:
    """(B, q) each: how much each new row counts, and how many valid rows there are from it on."""
    after = queries.valid.long().flip(1).cumsum(1).flip(1)
    weight = decay ** (after - 1).clamp(min=0).float() * queries.valid
    return weight * torch.tensor(voters, device=weight.device), after


def _outlive(held: HeldLayer, rivals: Rivals, holding: Holding, ages: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, 1 or Hkv, 1): the slot of the rival that goes; (B, 1 or Hkv, S): all from the oldest to the newest then."""
    (B, H, S), first = held.keys.shape[:3], rivals.first
    if ages is None:
        ages = in_order(B, S, held.keys.device)[1].expand(-1, H if rivals.pair else 1, -1)
    if not rivals.pair:
        slot = ages[..., first : first + 1]
        return slot, torch.cat([ages[..., :first], ages[..., first + 1 :], slot], -1)
    scores, votes = held.side["scores"], held.side.get("votes")
    pair = ages[..., first : first + 2]
    older_goes = holding.older_goes(scores.gather(2, pair), None if votes is None else votes.gather(2, pair))
    older, younger = pair.split(1, -1)
    slot, stays = torch.where(older_goes, older, younger), torch.where(older_goes, younger, older)
    return slot, torch.cat([ages[..., :first], stays, ages[..., first + 2 :], slot], -1)
