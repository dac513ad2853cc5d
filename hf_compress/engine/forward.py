"""The way into the language model and out of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_compress.engine.among import among
from hf_compress.engine.attention import Call, Weighted
from hf_compress.engine.book import Placement
from hf_compress.engine.context import Context
from hf_compress.engine.decoder import LayerView, enter, join, remember_places, sample_by_sample
from hf_compress.engine.effect import check_prompt
from hf_compress.engine.entry import at_every_row, cut, find_packing, whole
from hf_compress.engine.further import Enough, look_ahead
from hf_compress.engine.idle import idle_layers
from hf_compress.engine.inputs import check_apart
from hf_compress.engine.looks import looks_of
from hf_compress.engine.passing import passing
from hf_compress.engine.plans import budget_of, plans_of
from hf_compress.engine.reader import read
from hf_compress.engine.recorder import Recorder
from hf_compress.engine.reread import reread_prompt
from hf_compress.engine.seams import check_labels
from hf_compress.engine.state import Forward
from hf_compress.engine.text import select
from hf_compress.layout import Layout
from hf_compress.patches import versions
from hf_compress.stores import adopt, held_layers, layout_of


def check_alone(decoder: nn.Module) -> None:
    """Raises ValueError where a language model is already compressed, as a part of another model."""
    for hook in decoder._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, LanguageModel):
            whole = type(owner.context.model).__name__
            raise ValueError(
                f"model: its language model, a {type(decoder).__name__}, belongs to a {whole} that is compressed by "
                f"{owner.context.name}; decompress() that first"
            )


class LanguageModel:
    """Hooks of the language model: rows are cut at its entry and stand at the caller's places again at its exit."""

    def __init__(self, context: Context):
        self.context = context

    @torch.compiler.disable
    def enter(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cut the prompt, settle the layout, announce it to the cache."""
        context = self.context
        now = context.state.forward
        if context.state.bypass or (now is not None and now.given.bare):
            return None
        if now is None:
            raise RuntimeError(
                f"{type(decoder).__name__} was called directly; call the compressed model itself "
                f"({type(context.model).__name__}), or decompress() it first. A trainer may have replaced its forward, "
                "as those of TRL do: compress it after the trainer is made"
            )
        kw = {**dict(zip(context.decoder_names, args)), **versions.renamed(kwargs, context.cache_names[1])}
        ids, x = kw.pop("input_ids", None), kw.get("inputs_embeds")
        x = kw["inputs_embeds"] = decoder.get_input_embeddings()(ids) if x is None else x
        kw.update({k: t.to(x.device) for k, t in kw.items() if torch.is_tensor(t)})  # device maps move them later
        if kw.get("logits_to_keep", 1) != 1:  # a few run their last layers for these rows only: ours stand elsewhere
            kw["logits_to_keep"] = 0
        self._open_cache(now, kw)
        mask = kw.get("attention_mask")
        now.given.ready_made = isinstance(mask, dict) or (torch.is_tensor(mask) and mask.ndim == 4)
        B, q = now.given.size = x.shape[0], x.shape[1]
        now.given.packing = find_packing(context, now, kw)
        before = layout_of(now.given.cache) if now.given.past else None
        none = torch.zeros(B, dtype=torch.int64, device=x.device)
        removed, images = (none, none) if before is None else (before.removed, before.images)
        if context.probe.content and now.given.cache is not None and not now.given.past:
            now.notes.content = context.visual.content(now, x)
        ahead = look_ahead(context, now, kw)
        looks = looks_of(now, ahead) if ahead is not None and context.probe.looks else None
        found = context.visual.locate(now, x, images, looks) if q > 1 or now.given.of_prompt else None
        if found is not None:
            check_apart(context, now)
            images = torch.maximum(images, found.image.amax(1) + 1)
        now.notes.owner = None if found is None else found.owner
        if found is not None and found.number is not None and found.book is not None:
            now.notes.passing = passing(found.number, found.book.keep, now.given.past)
        found = select(context, now, kw, found, ahead)
        rows = now.rows.local = torch.arange(q, device=x.device).expand(B, q)
        valid = None if now.given.mask is None else now.given.mask[:, -q:].bool().to(x.device)
        if found is not None and found.changes:
            cut(context, now, kw, valid, removed, images, found)
        else:
            now.rows.layout = whole(now, valid, removed, images, None if found is None else found.image)
            if now.given.past and context.renumber:
                given = kw.get("position_ids")
                kw["position_ids"] = (now.given.past + rows if given is None else given) - removed[:, None]
        if now.notes.passing is not None:
            check_labels(now, now.notes.passing.goes.gather(1, now.rows.local))
        now.rows.entered, now.given.positions = now.rows.layout, kw.get("position_ids")
        for layer in held_layers(now.given.cache):
            layer.announce(now.rows.layout)
        self._plan(now, kw["inputs_embeds"], found)
        now.notes.wanted = context.probe.wanted(now)
        if context.probe.again and not now.given.past:
            now.notes.embeds = kw["inputs_embeds"].detach(), now.rows.layout
        if now.given.of_prompt and now.given.reread is None:
            real = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid
            book = None if found is None else found.book
            now.notes.recorder = Recorder(book, real, now.given.cache)
        return (), kw

    def _open_cache(self, now: Forward, kw: dict[str, Any]) -> None:
        """Our layers in the cache that came along, or in a new one if the call will use one."""
        context = self.context
        cache, config = versions.cache_of(kw), context.decoder.config
        if cache is None and context.uses_cache(kw) and not versions.checkpoints(context.decoder):
            cache = kw[context.cache_names[1]] = DynamicCache(config=config)
        if cache is not None:
            adopt(cache, config, context.name)
            now.given.cache, now.given.past = cache, cache.get_seq_length()

    def _plan(self, now: Forward, x: Tensor, found: Placement | None) -> None:
        """Rows that stay per sample and layer, for the decoder stage."""
        context, method, given = self.context, self.context.decoder_method, now.given
        if method is None or given.reread is not None:
            return
        if found is None and not given.of_prompt:
            now.notes.idle = idle_layers(context, now)
            return
        if context.stages["decoder"].ratio == 0:
            return  # also of methods whose thresholds ask for no ratio
        remember_places(now)
        if found is not None:
            now.notes.memory |= {n: t.gather(1, now.rows.local.to(t.device)) for n, t in found.noted.items()}
        one, states, packed = now, x, None
        if given.packing is not None:
            one, states, _, packed = sample_by_sample(now, 0, x, None)
        view = LayerView(one, context.adapter, context.decoder, method, 0, states, None, None)
        left = now.notes.left = view.removable.sum(1).tolist()
        enter(view, method)
        if packed is not None:
            join(packed, one, now, None)
        samples = [1] * given.size[0] if given.packing is None else given.packing.counts
        images = [1] * sum(samples)
        if found is not None and found.book is not None:
            shown = [mine.count(i) for mine, n in zip(found.book.sample, samples) for i in range(n)]
            images = [method.units(n) for n in shown]
        first, stage, layers = (
            context.adapter.min_drop_layer(context.model),
            context.stages["decoder"],
            len(context.layers),
        )
        now.notes.budget = [budget_of(stage, layers, n, shown) for n, shown in zip(left, images)]
        now.notes.changing = context.probe.changes
        now.notes.plan = plans_of(stage, layers, left, images, first, context.plans)

    @torch.compiler.disable
    def record(self, layer: int, call: Call) -> Tensor | Weighted | Call | None:
        """Called by the taps of the decoder layers; reads entries that lie end to end or packed itself."""
        context, now = self.context, self.context.state.forward
        if now is None:
            return None
        if layer in now.notes.wanted:
            now.notes.records[layer] = call.record()
            if now.given.bare and layer == max(now.notes.wanted):
                raise Enough
        held = now.given.cache.layers[layer] if now.given.cache is not None else None
        if context.policy is not None and (done := read(context, now, layer, held, call)) is not None:
            if isinstance(done, Call) and context.recorder is not None:
                context.recorder.read[layer] = done.key.nbytes + done.value.nbytes
            return done
        if layer in now.notes.picking and (some := among(context, now, layer, call)) is not None:
            return some
        if held is None:
            return None
        if held.in_place:
            return held.attend(call.query, call.scaling)
        if context.policy is None or context.model.training or (now.given.ready_made and not now.given.past):
            return None
        if now.notes.memo.get("kernel") != "sdpa":
            return None
        found = context.policy.attend(held, now.rows.layout.to(call.key.device), call)
        if found is None:
            return None
        out, now.notes.received[layer] = found
        return out

    @torch.compiler.disable
    def leave(self, decoder: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Back to the caller's length: a removed row repeats its last surviving predecessor."""
        context, now = self.context, self.context.state.forward
        if now is None or context.state.bypass or now.given.reread is not None or now.given.bare:
            return None
        if len(context.proved) < 2 and not now.given.past:
            check_prompt(context, now, out)
        if context.probe.again and now.given.cache is not None and not now.given.past:
            reread_prompt(context, now)
        if now.notes.passing is not None and now.given.cache is not None:
            now.notes.passing.leave(now)
        for layer in held_layers(now.given.cache) if now.given.of_prompt else ():
            layer.turn = now.given.past + now.given.size[1]
            if now.given.lasting:
                layer.bound()
        if now.notes.recorder is not None:
            now.notes.recorder.finish(self._layouts(now), now.given.past, now.given.cache)
        if not now.rows.moved:  # as many rows may still stand elsewhere than the caller's
            return None
        asked = now.given.inputs.get("logits_to_keep")
        if isinstance(asked, int) and asked == 1:  # so does generate(): the head reads no row but the last
            full = out[0][:, -1:].expand(-1, now.given.size[1], -1)
        else:
            full = at_every_row(out[0], now.rows.layout, now)
        if isinstance(out, tuple):
            return (full, *(self._per_layer(part, now) for part in out[1:]))
        out.last_hidden_state = full
        if getattr(out, "hidden_states", None) is not None:
            out.hidden_states = self._per_layer(out.hidden_states, now)
        return out

    def _per_layer(self, part: Any, now: Forward) -> Any:
        """Hidden states of all layers at the caller's length; anything else as it is."""
        if not isinstance(part, tuple) or len(part) != len(self.context.layers) + 1:
            return part
        layouts = [now.rows.entered, *self._layouts(now)]
        if self.context.decoder_method is not None and self.context.decoder_method.waits:
            layouts = [now.rows.entered] * len(part)  # all rows are there again behind a layer
        states = zip(part, layouts)  # None where a layer was not asked for; attentions (four dimensions) stay short
        return tuple(at_every_row(x, at, now) if torch.is_tensor(x) and x.ndim == 3 else x for x, at in states)

    def _layouts(self, now: Forward) -> list[Layout]:
        """Of every layer, in order."""
        return now.rows.held or [now.rows.layout] * len(self.context.layers)
