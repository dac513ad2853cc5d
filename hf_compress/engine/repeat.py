"""Further forwards that feed a prompt again, with its cache: the entries that they look at are those that matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_compress.engine.state import Forward
from hf_compress.layout import Layout
from hf_compress.signals import Repetition
from hf_compress.stores import HeldLayer
from hf_compress.tensors.attention import Record, column_max

if TYPE_CHECKING:
    from hf_compress.engine.runtime import Compression


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


class Again:
    """What can be fed again of a batch of prompts: embeddings, positions, and which slots hold entries."""

    def __init__(self, owner: Compression, now: Forward):
        assert owner.evicts is not None and now.embeds is not None
        self.owner, self.cache, (self.embeds, self.layout) = owner, now.cache, now.embeds
        B, S = self.layout.index.shape
        position = torch.arange(S, device=self.embeds.device)[None] if now.positions is None else now.positions
        position = position[-3:] if position.ndim == 3 else position.expand(1, -1, S)  # M-RoPE has three axes
        self.position = position.expand(-1, B, -1)
        self.next = now.next_position().expand(B).tolist()
        self.slots = [v.nonzero()[:, 0] for v in self.layout.valid]
        samples = zip(self.layout.image, self.slots)
        self.plans = [owner.evicts.repeats(image[at].tolist()) for image, at in samples]

    def run(self, turn: int, scores: dict[int, Tensor]) -> None:
        """One forward: the repetition number `turn` of every sample that has so many."""
        parts = [self._part(b, plan[turn]) if turn < len(plan) else None for b, plan in enumerate(self.plans)]
        B, q, owner = len(parts), max(len(part[0]) for part in parts if part is not None), self.owner
        x = self.embeds.new_zeros(B, q, self.embeds.shape[-1])
        position = self.position.new_zeros(len(self.position), B, q)
        rows = torch.zeros(B, q, dtype=torch.bool, device=x.device)
        spans = torch.zeros(B, 3, dtype=torch.int64, device=x.device)
        for b, part in enumerate(parts):
            if part is not None:
                n = len(part[0])  # fillers behind, so that sliding windows reach as far back as alone
                x[b, :n], position[:, b, :n], spans[b], rows[b, :n] = *part, True
        if owner.renumber:
            position = position + self.layout.removed[:, None].to(position.device)  # what the entry takes off again
        mask = torch.cat([rows.new_ones(B, self.layout.seen), rows], 1).long()
        owner.state.forward = Forward({}, None, mask, repeat=Pass(spans, rows, scores))
        owner.decoder(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=position[0] if len(position) == 1 else position,
            use_cache=True,
            **{owner.cache_names[1]: self.cache},
        )

    def _part(self, b: int, one: Repetition) -> tuple[Tensor, Tensor, Tensor]:
        """(n, D) embeddings, (axes, n) positions and the span of `Pass` of one repetition."""
        at, index = self.slots[b], self.layout.index[b]
        before, after = (self._embed(ids) for ids in (one.before, one.after))
        lead = torch.cat([before, self.embeds[b, at[one.hint : one.first]], after])
        own = at[one.first : one.stop]
        place = self.position[:, b, own]
        place = place - place.min() + self.next[b] + len(lead)  # images keep their shape on M-RoPE
        text = torch.arange(len(lead), device=place.device) + self.next[b]
        span = torch.stack([index[own[0]], index[own[-1]] + 1, index[at[one.sinks]] if one.sinks else index[0] * 0])
        return torch.cat([lead, self.embeds[b, own]]), torch.cat([text.expand(len(place), -1), place], 1), span

    def _embed(self, ids: tuple[int, ...]) -> Tensor:
        table = self.owner.decoder.get_input_embeddings()
        return table(torch.tensor(ids, dtype=torch.int64, device=self.embeds.device)).to(self.embeds.dtype)


@torch.no_grad()
def repeat_prompt(owner: Compression, now: Forward) -> None:
    """Score the prompt of a forward that has just gone through all layers by feeding it again, and evict it.

    Every pass appends to the cache, which is as before after it.
    """
    policy, cache = owner.policy, now.cache
    assert policy is not None and now.embeds is not None
    if policy.ratio == 0 or (policy.keep or 0) >= len(now.embeds[1]):
        return
    again, scores = Again(owner, now), {}
    for i in policy.layers:
        keys = cache.layers[i].keys
        scores[i] = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    before = [dict(vars(layer)) for layer in cache.layers]  # tensors are replaced, never written to
    for turn in range(max(map(len, again.plans))):
        try:
            again.run(turn, scores)
        finally:
            owner.state.forward = now
            for layer, old in zip(cache.layers, before):
                vars(layer).update(old)
    now.embeds = None
    policy.after_passes(cache, scores)
