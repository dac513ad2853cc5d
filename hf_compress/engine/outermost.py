"""The outermost call of a compressed model: what it is passed, and that it leaves nothing behind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.engine.inputs import check
from hf_compress.engine.instead import Instead
from hf_compress.engine.masks import slot_mask
from hf_compress.engine.state import Forward, Given, Run
from hf_compress.engine.teacher import divergence, lesson
from hf_compress.patches.versions import cache_of, renamed
from hf_compress.stores import held_layers, layout_of

PER_ROW = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


class Outermost(Instead):
    """Instance attribute `forward`: runs as `model(...)` and as `model.forward(...)`.

    Raises (on call):
        ValueError: what was passed cannot go with the compression; the message says what works.
    """

    @torch.compiler.disable(recursive=False)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        context, state = self.context, self.context.state
        run, state.prepared = state.prepared, None
        if run is not None and run.bare:
            if run.negative is not None:
                run.negative.inputs = self.named(args, renamed(kwargs, context.cache_names[0]))
            out = self.original(*args, **kwargs)
            if run.recorder is not None:
                context.recorder, run.recorder = run.recorder, None
            return out
        context.settle(context.model.training)
        alone = state.run is None and state.forward is None  # no other call of this model goes on
        before = context.recorder
        kwargs = renamed(kwargs, context.cache_names[0])
        inputs = self.named(args, kwargs)
        try:
            with state.scope():
                state.run, state.forward = run, None
                if run is not None:
                    run.encoded = state.encoded = state.encoded if run.encoded is None else run.encoded
                if candidates := self._candidates(inputs, run):
                    return self._prompt_first(inputs, run, candidates)
                return self._feed(inputs, run, args, kwargs)
        except BaseException:
            context.lend()  # the step that it was lent for is over
            raise
        finally:
            if run is None and not alone:
                context.recorder = (
                    before  # a pass beside a generate(), of guidance for instance: not what was asked for
                )
            if run is not None and run.chunked is None and context.uses_cache(inputs):
                run.encoded = state.encoded = {}  # no later step will ask for them
            elif alone and not inputs.get("mm_encoder_outputs"):
                state.encoded = {}

    @torch.compiler.disable(recursive=False)
    def _feed(self, inputs: dict[str, Any], run: Run | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward, with the arguments that `inputs` are by name."""
        now, mask = self._noted(inputs, run)
        if mask is not None:
            args, kwargs = (), dict(inputs, attention_mask=mask)
        taught = lesson(self.context, self.original, inputs)
        try:
            out = self.original(*args, **kwargs)
        finally:
            if now.given.of_prompt:
                for layer in held_layers(now.given.cache):
                    layer.rest()
        if now.notes.recorder is not None:  # the prompt is done
            self.context.recorder = now.notes.recorder
        if taught is not None and self.context.distill is not None:
            now.notes.losses.append(divergence(self.context.distill, out, inputs, taught))
        return _with_losses(out, now, inputs) if now.notes.losses else out

    @torch.compiler.disable
    def _noted(self, inputs: dict[str, Any], run: Run | None) -> tuple[Forward, Tensor | None]:
        """The forward that begins, and in later steps a 2-D mask with the validity of the slots, if one is needed."""
        context, mask = self.context, inputs.get("attention_mask")
        check(context, inputs)
        mask = mask if torch.is_tensor(mask) and mask.ndim == 2 else None
        now = context.state.forward = Forward(Given(inputs, inputs.get("input_ids"), mask))
        if run is not None:
            now.given.prompt_rows, now.given.tentative = run.rows, run.tentative
            now.given.chunked = run.chunked is not None
        elif context.model.training and inputs.get("labels") is None:
            self._told_otherwise(now.given)
        layout = layout_of(cache_of(inputs))
        if layout is None or context.by_layer or (layout.all_valid and mask is None):
            return now, None
        given = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        now.given.mask = slot_mask(layout.to(given.device), mask, given.shape[1])
        return now, now.given.mask

    def _told_otherwise(self, given: Given) -> None:
        """Where the answers of a training step without labels begin: logits are asked for from the row before them on.

        Policy optimisation scores rollouts so, behind prompts padded on the left; one logit is that of a prompt.
        """
        asked, stages = given.inputs.get("logits_to_keep"), self.context.stages
        if not isinstance(asked, int) or asked < 1 or given.inputs.get("cu_seq_lens_q") is not None:
            given.untold = self.context.name if any(stage.ratio != 0 for stage in stages.values()) else None
        elif asked > 1:
            rows = given.inputs["inputs_embeds"] if given.ids is None else given.ids
            cache = cache_of(given.inputs)
            given.prompt_rows = rows.shape[1] + (0 if cache is None else cache.get_seq_length()) - asked + 1

    @torch.compiler.disable
    def _candidates(self, inputs: dict[str, Any], run: Run | None) -> int:
        """Rows behind the prompt in its very first forward: assisted decoding checks candidates together with it."""
        ids, cache = inputs.get("input_ids"), cache_of(inputs)
        if run is None or not run.rows or ids is None or cache is None:
            return 0
        if all(stage.ratio == 0 for stage in self.context.stages.values()):
            return 0  # the bare model feeds them together
        return 0 if cache.get_seq_length() else max(0, ids.shape[1] - run.rows)

    def _prompt_first(self, inputs: dict[str, Any], run: Run | None, candidates: int) -> Any:
        """Feed the prompt alone, so that it is evicted before the candidates read it; what comes out is joined."""
        own = {k: v for k, v in inputs.items() if v is not None}
        rows = own["input_ids"].shape[1] - candidates
        head, tail = dict(own, logits_to_keep=1), dict(own, logits_to_keep=candidates)
        for name in PER_ROW:
            if name in own:
                head[name] = own[name][..., :rows]
                tail[name] = own[name] if name == "attention_mask" else own[name][..., rows:]
        tail.pop("mm_encoder_outputs", None)
        first = self._feed(head, run, (), head)
        out = self._feed(tail, run, (), tail)
        out.logits = torch.cat([first.logits, out.logits], 1)
        for name in ("hidden_states", "attentions"):
            if getattr(out, name, None) is not None:
                setattr(out, name, tuple(map(_joined, getattr(first, name), getattr(out, name))))
        return out


def _with_losses(out: Any, now: Forward, inputs: dict[str, Any]) -> Any:
    """The output with what methods add to its loss; it is the first entry where labels were given."""
    if inputs.get("labels") is None:
        return out
    loss = out[0] + sum(extra.to(out[0]) for extra in now.notes.losses)
    if isinstance(out, tuple):
        return (loss, *out[1:])
    out.loss = loss
    return out


def _joined(head: Tensor | None, tail: Tensor | None) -> Tensor | None:
    """Hidden states (B, q, D) or attentions (B, H, q, S) of rows and those after them; nothing stands in short rows."""
    if head is None or tail is None:
        return tail
    if head.ndim == 4:
        wide = max(head.shape[3], tail.shape[3])
        head, tail = (F.pad(x, (0, wide - x.shape[3])) for x in (head, tail))
    return torch.cat([head, tail], -2)
