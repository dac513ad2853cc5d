"""The prompt stage: which text enters the language model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress import budget
from hf_compress.engine.answers import check_answer
from hf_compress.engine.book import Placement
from hf_compress.engine.context import Context
from hf_compress.engine.further import Prompt, logits_ahead, records_ahead
from hf_compress.engine.masks import visible
from hf_compress.engine.state import Forward
from hf_compress.engine.trained import module_of
from hf_compress.engine.vision import make, mix
from hf_compress.layout import Layout
from hf_compress.methods.base import PromptMethod
from hf_compress.signals import LOSS, Assignment, Read
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.attention import Record, rows_attention

ROWS = 256  # of logits that are turned into losses at once


class Ahead:
    """What a further forward over the whole prompt tells, of all samples at once; run when somebody first asks."""

    def __init__(self, context: Context, prompt: Prompt, reads: set[Read]):
        self.context, self.prompt, self.reads = context, prompt, reads

    @functools.cached_property
    def records(self) -> Mapping[int, Record]:
        """Queries and keys of the layers that are read."""
        layers = frozenset(r.at for r in self.reads if r.where == "layer" and r.what == "attention")
        return records_ahead(self.context, self.prompt, layers)

    @functools.cached_property
    def loss(self) -> Tensor:
        """(B, q) fp32: how little each row was expected from those before it; 0 of the first."""
        ids = self.prompt.ids
        logits, out = logits_ahead(self.context, self.prompt), torch.zeros(ids.shape, device=ids.device)
        for start in range(0, ids.shape[1] - 1, ROWS):
            part = slice(start, min(start + ROWS, ids.shape[1] - 1))
            after = slice(part.start + 1, part.stop + 1)
            out[:, after] = F.cross_entropy(logits[:, part].float().mT, ids[:, after], reduction="none")
        before = F.pad(self.prompt.mask, (1, -1), value=False)
        return out.masked_fill(~(self.prompt.mask & before), 0.0)

    def attention(self, layer: int) -> Tensor:
        """(B, q) fp32: what the last row of each prompt attends to in a layer, mean over heads."""
        mask = self.prompt.mask
        q = mask.shape[1]
        at = torch.arange(q, device=mask.device).expand_as(mask)
        layout = Layout(at, at, torch.full_like(at, -1), mask, at.new_zeros(len(at)), q)
        last = (mask * at).amax(1)[:, None]
        query, key, scaling = self.records[layer]
        window = self.context.adapter.window(self.context.decoder, layer)
        see = visible(layout, layout.gather(last), window, None).to(key.device)
        rows = last.to(query.device)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
        return rows_attention(query.gather(2, rows), key, scaling, see).mean(1)[:, 0].to(mask.device)


class TextView:
    """The text of one sample that may go: the `Text` that a method sees."""

    def __init__(self, ids: Tensor, embeddings: Tensor, at: Tensor, sample: int, length: int, ahead: Ahead):
        self.ids, self.embeddings, self.at, self.length = ids[None], embeddings[None], at[None], length
        self._sample, self._rows, self._ahead = sample, at, ahead

    @property
    def module(self) -> nn.Module:
        found = module_of(self._ahead.context.model, "prompt")
        assert found is not None
        return found

    def _declared(self, read: Read) -> None:
        if read not in self._ahead.reads:
            raise RuntimeError(f"{read} is not among what the method declares by `reads`")

    def attention(self, layer: int) -> Tensor:
        self._declared(Read("layer", layer, "attention"))
        return self._ahead.attention(layer)[self._sample, self._rows][None]

    @property
    def loss(self) -> Tensor:
        self._declared(LOSS)
        return self._ahead.loss[self._sample, self._rows][None]


def select(context: Context, now: Forward, kw: dict[str, Any], found: Placement | None) -> Placement | None:
    """What of a prompt is left by its text stage too; as `found` where it does not act."""
    method, stage, given, x = context.prompt_method, context.stages.get("prompt"), now.given, kw["inputs_embeds"]
    if method is None or stage is None or given.reread is not None or not given.of_prompt or x.shape[1] < 2:
        return found
    if given.ids is None:
        raise ValueError(f"inputs_embeds without input_ids: method={stage.name!r} reads tokens; pass input_ids")
    if given.packing is not None or (given.mask is None and given.inputs.get("attention_mask") is not None):
        raise ValueError(f"method={stage.name!r} takes one sample per row and a 2-D attention_mask; pad the samples")
    B, q = given.size
    every = torch.ones(B, q, dtype=torch.bool, device=x.device)
    real = every if given.mask is None else given.mask[:, -q:].bool().to(x.device)
    out = found or Placement(every, torch.full((B, q), -1, device=x.device))
    if given.prompt_rows is not None:  # without a cache what was generated stands behind it
        real = real & (torch.arange(given.past, given.past + q, device=x.device) < given.prompt_rows)
    ids = given.ids.to(x.device)
    prompt = Prompt(x.detach(), ids, real, kw.get("position_ids"), kw["attention_mask"] if given.ready_made else None)
    ahead = Ahead(context, prompt, method.reads(len(context.layers)))
    keep, vectors = out.keep.clone(), []
    for b, free in enumerate(_free(now, method, real & (out.image < 0) & out.keep)):
        n = budget.kept(len(free), stage.ratio) if stage.ratio is not None else min(len(free), stage.keep or 0)
        if n == len(free):  # nothing is to go
            continue
        view = TextView(ids[b, free], x[b, free], free, b, int(real[b].sum()), ahead)
        with torch.no_grad():
            answer: Assignment = own_precision(method.assign)(view, n)
        check_answer(answer, stage.name, (1, len(free)), n)
        keep[b, free] = answer.stays(len(free))[0]
        if made := make(stage, view, answer):
            vectors.append((b, free[answer.kept[made[0]]], made[1]))
        elif answer.merges:
            mixed = answer.mixed
            vectors.append((b, free[answer.kept[mixed]], mix(answer, view.embeddings, mixed)))
    return _joined(out, keep, vectors)


def _free(now: Forward, method: PromptMethod, text: Tensor) -> list[Tensor]:
    """Per sample the rows of text that may go: none with a label, none that is to predict one, none at either end."""
    labels = now.given.inputs.get("labels")
    if torch.is_tensor(labels):
        answer = labels.to(text.device).ne(-100)
        text = text & ~answer & ~F.pad(answer[:, 1:], (0, 1), value=False)
    rows = [row.nonzero()[:, 0] for row in text]
    return [at[method.keep_first : max(method.keep_first, len(at) - method.keep_last)] for at in rows]


def _joined(found: Placement, keep: Tensor, vectors: list[tuple[int, Tensor, Tensor]]) -> Placement:
    """A placement with what text stays, and the vectors that stand for more than one of its rows."""
    merged = [] if found.merged is None else [found.merged]
    merged += [(torch.full_like(at, b), at, new) for b, at, new in vectors]
    b_col_new = [torch.cat(parts) for parts in zip(*merged)] if merged else None
    if found.book is not None:
        found.book.keep = keep
    return Placement(keep, found.image, None if b_col_new is None else tuple(b_col_new), found.book)  # type: ignore
