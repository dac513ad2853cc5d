"""Further forwards that feed a prompt again, with its cache: the entries that they look at are those that matter."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.engine.context import Context
from hf_compress.engine.passes import Pass
from hf_compress.engine.state import Forward, Given
from hf_compress.methods.base import Rereading
from hf_compress.signals import Repetition


class Again:
    """What can be fed again of a batch of prompts: embeddings, positions, and which slots hold entries."""

    def __init__(self, context: Context, now: Forward):
        method = context.cache_method
        assert isinstance(method, Rereading) and now.notes.embeds is not None
        self.context, self.cache, (self.embeds, self.layout) = context, now.given.cache, now.notes.embeds
        B, S = self.layout.index.shape
        position = (
            torch.arange(S, device=self.embeds.device)[None] if now.given.positions is None else now.given.positions
        )
        position = position[-3:] if position.ndim == 3 else position.expand(1, -1, S)  # M-RoPE has three axes
        self.position = position.expand(-1, B, -1)
        self.next = now.given.next_position().expand(B).tolist()
        self.slots = [v.nonzero()[:, 0] for v in self.layout.valid]
        samples = zip(self.layout.image, self.slots)
        self.plans = [method.repeats(image[at].tolist()) for image, at in samples]

    def run(self, turn: int, scores: dict[int, Tensor]) -> None:
        """One forward: the repetition number `turn` of every sample that has so many."""
        parts = [self._part(b, plan[turn]) if turn < len(plan) else None for b, plan in enumerate(self.plans)]
        B, q, context = len(parts), max(len(part[0]) for part in parts if part is not None), self.context
        x = self.embeds.new_zeros(B, q, self.embeds.shape[-1])
        position = self.position.new_zeros(len(self.position), B, q)
        rows = torch.zeros(B, q, dtype=torch.bool, device=x.device)
        spans = torch.zeros(B, 3, dtype=torch.int64, device=x.device)
        for b, part in enumerate(parts):
            if part is not None:
                n = len(part[0])  # fillers behind, so that sliding windows reach as far back as alone
                x[b, :n], position[:, b, :n], spans[b], rows[b, :n] = *part, True
        if context.renumber:
            position = position + self.layout.removed[:, None].to(position.device)  # what the entry takes off again
        mask = torch.cat([rows.new_ones(B, self.layout.seen), rows], 1).long()
        context.state.forward = Forward(Given({}, mask=mask, reread=Pass(spans, rows, scores)))
        context.decoder(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=position[0] if len(position) == 1 else position,
            use_cache=True,
            **{context.cache_names[1]: self.cache},
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
        table = self.context.decoder.get_input_embeddings()
        return table(torch.tensor(ids, dtype=torch.int64, device=self.embeds.device)).to(self.embeds.dtype)


@torch.no_grad()
def reread_prompt(context: Context, now: Forward) -> None:
    """Score the prompt of a forward that has just gone through all layers by feeding it again, and evict it.

    Every pass appends to the cache, which is as before after it.
    """
    policy, cache = context.policy, now.given.cache
    assert policy is not None and now.notes.embeds is not None
    if policy.ratio == 0 or (policy.keep or 0) >= len(now.notes.embeds[1]):
        return
    again, scores = Again(context, now), {}
    for i in policy.layers:
        keys = cache.layers[i].keys
        scores[i] = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    before = [dict(vars(layer)) for layer in cache.layers]  # tensors are replaced, never written to
    for turn in range(max(map(len, again.plans))):
        try:
            again.run(turn, scores)
        finally:
            context.state.forward = now
            for layer, old in zip(cache.layers, before):
                vars(layer).update(old)
    now.notes.embeds = None
    policy.after_passes(cache, scores)
