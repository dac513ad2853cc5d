"""The prompt stage: which text enters the language model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress import budget
from hf_compress.engine.answers import check_answer
from hf_compress.engine.book import Placement
from hf_compress.engine.context import Context
from hf_compress.engine.further import Ahead
from hf_compress.engine.state import IGNORED, Forward
from hf_compress.engine.trained import module_of
from hf_compress.engine.vision import make, mix
from hf_compress.methods.base import PromptMethod
from hf_compress.signals import LOSS, Assignment, Read
from hf_compress.tensors.ambient import own_precision


class TextView:
    """The text of one sample that may go: the `Text` that a method sees."""

    def __init__(
        self,
        ids: Tensor,
        embeddings: Tensor,
        at: Tensor,
        sample: int,
        length: int,
        module: nn.Module | None,
        ahead: Ahead | None,
        reads: set[Read],
    ):
        self.ids, self.embeddings, self.at, self.length = ids[None], embeddings[None], at[None], length
        self._sample, self._rows, self._module, self._ahead, self._reads = sample, at, module, ahead, reads

    @property
    def module(self) -> nn.Module:
        assert self._module is not None
        return self._module

    def _declared(self, read: Read) -> Ahead:
        if read not in self._reads or self._ahead is None:
            raise RuntimeError(f"{read} is not among what the method declares by `reads`")
        return self._ahead

    @property
    def layers(self) -> int:
        assert self._ahead is not None
        return len(self._ahead.context.layers)

    def attention(self, layer: int, *, softmax: bool = True) -> Tensor:
        ahead = self._declared(Read("layer", layer, "attention"))
        return ahead.attention(layer, ahead.last(), softmax=softmax)[self._sample].mean(0)[self._rows][None]

    @property
    def loss(self) -> Tensor:
        return self._declared(LOSS).loss[self._sample, self._rows][None]


def select(
    context: Context, now: Forward, kw: dict[str, Any], found: Placement | None, ahead: Ahead | None
) -> Placement | None:
    """What of a prompt is left by its text stage too; as `found` where it does not act."""
    method, stage, given, x = context.prompt_method, context.stages.get("prompt"), now.given, kw["inputs_embeds"]
    if method is None or stage is None or given.reread is not None or not given.of_prompt or x.shape[1] < 2:
        return found
    if given.ids is None:
        raise ValueError(f"inputs_embeds without input_ids: method={stage.name!r} reads tokens; pass input_ids")
    if given.packing is not None or (given.mask is None and given.inputs.get("attention_mask") is not None):
        raise ValueError(f"method={stage.name!r} takes one sample per row and a 2-D attention_mask; pad the samples")
    given.check_told()
    B, q = given.size
    every = torch.ones(B, q, dtype=torch.bool, device=x.device)
    real = every if given.mask is None else given.mask[:, -q:].bool().to(x.device)
    out = found or Placement(every, torch.full((B, q), -1, device=x.device))
    if given.prompt_rows is not None:  # without a cache what was generated stands behind it
        real = real & (torch.arange(given.past, given.past + q, device=x.device) < given.prompt_rows)
    ids = given.ids.to(x.device)
    module, reads = module_of(context.model, "prompt"), method.reads(len(context.layers))
    keep, vectors = out.keep.clone(), []
    for b, free in enumerate(_free(now, method, real & (out.image < 0) & out.keep)):
        n = budget.kept(len(free), stage.ratio) if stage.ratio is not None else min(len(free), stage.keep or 0)
        if n == len(free):  # nothing is to go
            continue
        view = TextView(ids[b, free], x[b, free], free, b, int(real[b].sum()), module, ahead, reads)
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
    labels, predicts = now.given.inputs.get("labels"), torch.zeros_like(text)
    if torch.is_tensor(labels):
        answer = labels.to(text.device).ne(IGNORED)
        text, predicts = text & ~answer, F.pad(answer[:, 1:], (0, 1), value=False)
    rows = [row.nonzero()[:, 0] for row in text]  # ends are those of the prompt that generate() would be given
    rows = [at[method.keep_first : max(method.keep_first, len(at) - method.keep_last)] for at in rows]
    return [at[~predicts[b, at]] for b, at in enumerate(rows)]


def _joined(found: Placement, keep: Tensor, vectors: list[tuple[int, Tensor, Tensor]]) -> Placement:
    """A placement with what text stays, and the vectors that stand for more than one of its rows."""
    merged = [] if found.merged is None else [found.merged]
    merged += [(torch.full_like(at, b), at, new) for b, at, new in vectors]
    b_col_new = [torch.cat(parts) for parts in zip(*merged)] if merged else None
    if found.book is not None:
        found.book.keep = keep
    return replace(found, keep=keep, merged=None if b_col_new is None else tuple(b_col_new), owner=None)  # type: ignore
