"""Caches edited by hand: one layer of random entries, and the bare model over what a compressed cache holds.

prompt = Random(groups=2)                       # two samples, one left padded
held = prompt.settle(method, ratio=0.5)         # the layer after the engine compressed it
prompt.held(held, b, h)                         # {row: (key, value, bias)} of one head
"""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_compress.engine.evict import CachePolicy
from hf_compress.engine.rotary import Rotary
from hf_compress.layout import Layout
from hf_compress.stores import HeldLayer
from tests.invariants.reference import Run, bare, embed, extend, prompt_positions

LONG, SHORT, SIZE = 24, 17, 8


class Random:
    """One layer of a prompt of random queries, keys and values: samples of 24 and 17 rows, left padded.

    Args:
        groups: query heads per KV head; kv_heads: KV heads.
        visual: rows of each sample that belong to an image, counted without padding.
    """

    def __init__(
        self, groups: int, kv_heads: int = 2, visual: tuple[range, range] = (range(0), range(0)), seed: int = 0
    ):
        g = torch.Generator().manual_seed(seed)
        shape = (2, kv_heads, LONG, SIZE)
        self.heads, self.kv_heads, self.groups = kv_heads * groups, kv_heads, groups
        self.keys, self.values = (torch.randn(shape, generator=g) for _ in range(2))
        self.queries = 2 * torch.randn(2, self.heads, LONG, SIZE, generator=g)
        index = torch.arange(LONG).repeat(2, 1)
        valid = torch.ones(2, LONG, dtype=torch.bool)
        valid[1, : LONG - SHORT] = False
        self.first, self.lengths = [0, LONG - SHORT], [LONG, SHORT]
        image = torch.full_like(index, -1)
        for b, rows in enumerate(visual):
            image[b, [self.first[b] + r for r in rows]] = 0
        self.visual = image >= 0
        self.layout = Layout(index, index, image, valid, torch.zeros(2, dtype=torch.int64), LONG)
        angle = (valid.cumsum(1) - 1).clamp(min=0)[..., None] * 0.7 ** torch.arange(SIZE // 2)
        angle = torch.cat([angle, angle], -1)
        self.rotary = Rotary((angle.cos(), angle.sin()), apply_rotary_pos_emb)
        self.angle = angle

    def rows(self, b: int) -> list[int]:
        """Valid rows of a sample."""
        return list(range(self.first[b], LONG))

    def attention(self, b: int, h: int) -> torch.Tensor:
        """(LONG, LONG) of a query head, zero outside the sample."""
        out = torch.zeros(LONG, LONG)
        for r in self.rows(b):
            seen = list(range(self.first[b], r + 1))
            logits = self.keys[b, h // self.groups, seen] @ self.queries[b, h, r] / math.sqrt(SIZE)
            out[r, seen] = logits.softmax(0)
        return out

    def group_attention(self, b: int, h: int) -> torch.Tensor:
        """(LONG, LONG) mean over the query heads of a KV head."""
        return torch.stack([self.attention(b, h * self.groups + i) for i in range(self.groups)]).mean(0)

    def turned(self, key: torch.Tensor, b: int, row: int, sign: int) -> torch.Tensor:
        """A key rotated to the position of a row (sign 1), or back (sign -1)."""
        half = SIZE // 2
        c, s = self.angle[b, row, :half].cos(), sign * self.angle[b, row, :half].sin()
        return torch.cat([key[:half] * c - key[half:] * s, key[half:] * c + key[:half] * s])

    def settle(self, method: Any, ratio: str | None = None, keep: int | None = None, layer: int = 0) -> HeldLayer:
        """The layer after the end of the prompt."""
        held = HeldLayer()
        held.announce(self.layout)
        held.update(self.keys.clone(), self.values.clone())
        cache = SimpleNamespace(layers=[held] * (layer + 1))
        policy = CachePolicy(method, None if ratio is None else Fraction(ratio), keep, [layer], layer + 1)
        policy.after_prompt(cache, layer, self.layout, (self.queries, self.keys, SIZE**-0.5), self.rotary)
        return held

    def held(self, held: HeldLayer, b: int, h: int) -> dict[int, tuple[torch.Tensor, torch.Tensor, float]]:
        """{row: (key, value, bias)} of one head."""
        keys, values = held.whole()
        index, valid = held.layout.index[b], held.layout.valid[b]
        if index.ndim == 2:
            index, valid = index[h], valid[h]
        bias = torch.zeros(len(index)) if held.bias is None else held.bias[b, h]
        at = valid.nonzero()[:, 0].tolist()
        out = {int(index[i]): (keys[b, h, i], values[b, h, i], float(bias[i])) for i in at}
        assert len(out) == len(at), "a row is stored twice"
        return out


def assert_entries(got: dict[int, Any], expected: dict[int, Any]) -> None:
    """The same rows, and per row the same tensors and numbers."""
    assert sorted(got) == sorted(expected)
    for row, parts in expected.items():
        for mine, theirs in zip(got[row], parts):
            torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), atol=2e-5, rtol=1e-4)


def best(score: dict[int, float], rows: list[int], count: int) -> list[int]:
    """The `count` best rows, the best first, ties to the lower one."""
    return sorted(rows, key=lambda r: (-score[r], r))[:count]


@torch.no_grad()
def edited_logits(name: str, batch: dict[str, torch.Tensor], cache: Any, run: Run) -> torch.Tensor:
    """(B, T, V): the bare eager model over a prompt cache in which only what `cache` holds can be seen, as it is there.

    Args:
        cache: of the compressed model after one token, `run` a longer run of it.
    """
    model, L = bare(name), batch["input_ids"].shape[1]
    tokens = run.tokens[:, :-1]
    x = embed(name, batch, tokens)
    positions = extend(prompt_positions(name, batch), tokens.shape[1])
    decoder, whole = model.get_decoder(), DynamicCache(config=model.get_decoder().config)
    valid = batch["attention_mask"].bool()
    first = decoder(
        inputs_embeds=x[:, :L], position_ids=positions[..., :L], attention_mask=valid.long(), past_key_values=whole
    )
    logits, masks = [first.last_hidden_state[:, -1]], []
    for mine, theirs in zip(whole.layers, cache.layers):
        masks.append(_edit(mine, theirs, valid))
    for t in range(tokens.shape[1]):
        handles = []
        for layer, mask in zip(decoder.layers, masks):
            groups = model.config.get_text_config().num_attention_heads // mask.shape[1]
            add = torch.cat([mask, torch.zeros(*mask.shape[:2], t + 1)], -1).repeat_interleave(groups, 1)[:, :, None]
            put = lambda _, args, kwargs, add=add: (args, dict(kwargs, attention_mask=add))
            handles.append(layer.register_forward_pre_hook(put, with_kwargs=True))
        at = slice(L + t, L + t + 1)
        out = decoder(inputs_embeds=x[:, at], position_ids=positions[..., at], past_key_values=whole)
        logits.append(out.last_hidden_state[:, -1])
        for handle in handles:
            handle.remove()
    return model.lm_head(torch.stack(logits, 1))


def _edit(mine: Any, theirs: HeldLayer, valid: torch.Tensor) -> torch.Tensor:
    """Writes the entries of `theirs` into the full layer `mine`; (B, H, L) what to add to the logits."""
    keys, values = theirs.whole()
    B, H = keys.shape[:2]
    mask = torch.full((B, H, valid.shape[1]), -1e30)
    layout = theirs.layout
    bias = torch.zeros(keys.shape[:3]) if theirs.bias is None else theirs.bias
    for b in range(B):
        for h in range(H):
            index, real = (t[b] if t.ndim == 2 else t[b, h] for t in (layout.index, layout.valid))
            rows = index[real]
            mine.keys[b, h, rows], mine.values[b, h, rows] = keys[b, h, real], values[b, h, real]
            mask[b, h, rows] = bias[b, h, real]
    return mask
