"""At every decoder layer: rewrite rows, give the layer its own mask and rotary rows; after its attention, evict."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.engine.answers import check_answer
from hf_compress.engine.attention import TAP
from hf_compress.engine.context import Context
from hf_compress.engine.decoder import LayerView, decide, join, sample_by_sample
from hf_compress.engine.effect import untaken
from hf_compress.engine.masks import both, cut_mask, layer_mask, with_ahead
from hf_compress.engine.reader import seen
from hf_compress.engine.rotary import Rotary
from hf_compress.engine.seams import gate_of, rewrite, set_aside, trim_earlier
from hf_compress.engine.state import Forward
from hf_compress.engine.trained import module_of
from hf_compress.methods.reader import Reader
from hf_compress.patches.versions import cache_of
from hf_compress.stores import HeldLayer
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.rows import take


class LayerEntry:
    """Pre-hook of one decoder layer."""

    def __init__(self, context: Context, layer: int):
        self.context, self.layer = context, layer
        self.window = context.adapter.window(context.decoder, layer)
        self.earlier = context.adapter.earlier_layer(context.decoder, layer)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.context.state.forward
        if now is None or not now.given.size[1]:
            return None
        if self.layer in now.notes.idle:
            now.rows.held.append(now.rows.layout)
            return None
        if self.earlier is not None:  # its keys are those of a layer that was run: so is what may be seen of them
            now.rows.held.append(now.rows.layout)
            x, mask = args[0] if args else kwargs["hidden_states"], now.notes.memo["mask", self.earlier]
            return args, dict(kwargs, attention_mask=None if mask is None else mask[..., -x.shape[1] :, :])
        x = args[0] if args else kwargs["hidden_states"]
        if self.layer in now.notes.plan:
            if self.context.decoder_method is not None and self.context.decoder_method.picks:
                rotary, _ = self._positions(now, kwargs)
                now.notes.picking[self.layer] = self._view(now, x, rotary)
            else:
                x = self._rewrite(now, x, kwargs)
        held = now.given.cache.layers[self.layer] if now.given.cache is not None else None
        policy = self.context.policy
        later = policy is not None and not policy.steps.idle
        if now.given.past and later and held is not None and policy is not None and now.given.reread is None:
            policy.steps.before(held, self.layer, self._alone(now))
        tapped = TAP in getattr(module, "self_attn", module).__dict__  # else nobody would ask
        reader = None if policy is None or now.given.reread is not None else policy.reader
        reader = now.notes.passing or reader
        direct = held is not None and tapped and reader is None and self._kernel(now) == "sdpa"
        hidden = self._hidden(now, held, reader) if reader is not None and reader.hides else None
        kw = dict(kwargs, attention_mask=self._mask(now, held, x, kwargs.get("attention_mask"), direct, hidden))
        now.notes.memo["mask", self.layer] = kw["attention_mask"]
        if now.rows.cut is not None:
            kw["position_embeddings"], kw["position_ids"] = self._positions(now, kwargs)
        if held is not None:
            places = self._places(now, held, module, x)
            if places is not None:
                new = places.newest(len(now.rows.layout))
                kw["position_embeddings"] = new.cos, new.sin
            held.announce(now.rows.layout, places, direct)
        now.rows.held.append(now.rows.layout)
        now.notes.records.pop(self.layer - 2, None)  # the layer just run may still be asked for its attention
        if args:
            return (x, *args[1:]), kw
        return args, dict(kw, hidden_states=x)

    def _alone(self, now: Forward) -> bool:
        """Whether its one row may be written over an old entry: it stays, and nobody asks in which order they stand."""
        asks = self.context.policy is not None and self.context.policy.reader is not None
        return now.given.size[1] == 1 and not now.given.tentative and not asks and self._kernel(now) != "eager"

    def _kernel(self, now: Forward) -> str:
        """Name of the attention kernel, looked up once per forward: a config answers slowly."""
        if "kernel" not in now.notes.memo:
            now.notes.memo["kernel"] = self.context.decoder.config._attn_implementation
        return now.notes.memo["kernel"]

    def _rewrite(self, now: Forward, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The rows that go on, as the method of the decoder stage decides."""
        context, method, layer = self.context, self.context.decoder_method, self.layer
        assert method is not None
        rotary, _ = self._positions(now, kwargs)
        one, states, samples = now, x, None
        if now.given.packing is not None:
            one, states, rotary, samples = sample_by_sample(now, layer, x, rotary)
        view = self._view(one, states, rotary)
        name = context.stages["decoder"].name
        answer = found = decide(view, method, now.notes.plan[layer])
        if found is not None:
            B, S = view.valid.shape
            check_answer(found, name, (B, S), None)
        if samples is not None:
            answer = join(samples, one, now, found)
        if answer is None or found is None:
            return x
        local = now.rows.local

        def gate() -> Tensor | None:
            out = gate_of(name, method, view, found)
            return out if out is None or samples is None else samples.join(out, local)

        if method.waits:
            return set_aside(now, layer, x, answer, gate)
        if (counts := gate()) is not None:
            x = x * counts.to(x.device)[..., None].to(x.dtype)
        if method.trims and now.given.cache is not None:
            trim_earlier(now, layer, answer)
        return rewrite(now, x, answer)

    def _view(self, one: Forward, states: Tensor, rotary: Any) -> LayerView:
        """What the method of the decoder stage sees of the rows that enter."""
        context, method = self.context, self.context.decoder_method
        assert method is not None
        module = module_of(context.model, "decoder")
        return LayerView(one, context.adapter, context.decoder, method, self.layer, states, rotary, module)

    def _positions(self, now: Forward, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Rotary rows and position ids of the rows alive, gathered once per change and kind of layer."""
        tables, ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        cut = now.rows.cut
        if cut is None:
            return tables, ids
        key = (id(cut), id(tables[0]))  # sliding and full layers may rotate differently
        if key not in now.notes.memo:
            rotary = tuple(take(t, cut.to(t.device)) for t in tables)
            if ids is not None:  # (B, S), or M-RoPE positions (3, B, S)
                at = cut.to(ids.device).expand(*ids.shape[:-2], -1, -1)
                ids = ids.expand(*ids.shape[:-2], len(cut), -1).gather(-1, at)
            now.notes.memo[key] = (cut, tables, (rotary, ids))  # holding `cut` and `tables` keeps their ids taken
        return now.notes.memo[key][-1]

    def _places(self, now: Forward, held: HeldLayer, module: nn.Module, x: Tensor) -> Rotary | None:
        """Rotations of all slots by their places among the entries, where keys are not stored rotated."""
        if held.turned or held.layout is None:
            return None
        attention, decoder = module.self_attn, self.context.decoder
        function = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        kinds = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
        kind = [decoder.config.layer_types[self.layer]] if kinds else []
        keys = held.next_layout(now.rows.layout)
        key = ("places", *kind, len(keys), x.device) if keys.all_valid else ("places", id(keys))
        if key not in now.notes.memo:
            valid = keys.valid if keys.valid.ndim == 2 else keys.valid[:, 0]  # every head holds as many
            at = (valid.long().cumsum(-1) - 1).clamp(min=0).to(x.device)
            now.notes.memo[key] = (keys, decoder.rotary_emb(x, at, *kind))  # holding `keys` keeps its id taken
        cos, sin = (t.to(x.device) for t in now.notes.memo[key][1])
        if not self.context.adapter.rotates(attention):
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        return Rotary((cos, sin), function)

    def _hidden(self, now: Forward, held: HeldLayer | None, reader: Reader) -> Tensor | None:
        """(B, 1 or Hkv, q, S) bool: what a reader lets these rows see; None: everything."""
        rows = now.rows.layout
        keys = rows if held is None or held.layout is None else held.next_layout(rows)
        return seen(reader, now, keys, rows.to(keys.device))

    def _mask(
        self,
        now: Forward,
        held: HeldLayer | None,
        x: Tensor,
        given: Tensor | None,
        direct: bool,
        hidden: Tensor | None,
    ) -> Tensor | None:
        context, fresh, window = self.context, held is None or held.layout is None, self.window
        config = context.decoder.config
        packing = None if now.given.ready_made else now.given.packing
        spans = window is not None and context.cuts and not now.given.ready_made  # gaps, or samples beside it
        plain = now.rows.cut is None and hidden is None
        if fresh and plain and not (spans and (packing is not None or not context.renumber)):
            return given  # the model's own mask fits
        if fresh and not plain and now.given.ready_made and given is not None:
            short = given if now.rows.cut is None else cut_mask(given, now.rows.cut, now.rows.layout.valid)
            return both(short, hidden, config.num_attention_heads)
        eager = self._kernel(now) == "eager"
        one = now.given.size[1] == 1 and now.rows.layout.all_valid and hidden is None
        if not eager and window is None and one and not fresh:
            assert held is not None and held.layout is not None
            if held.layout.all_valid:
                return None  # one query that sees every slot: nothing to look up
        if (direct and held is not None and held.by_segments) or (packing is not None and packing.flash):
            return None
        keys, sight = now.rows.layout, None
        if held is not None and not fresh:
            keys = held.next_layout(now.rows.layout)
            if context.policy is not None and window is None:
                sight = context.policy.steps.sight(held, self.layer, keys, len(now.rows.layout))
        key = (id(keys), window, sight is None or self.layer)
        if key not in now.notes.memo:
            if packing is not None:
                sight = packing.sight(now.rows.local)
            if hidden is not None:
                sight = hidden if sight is None else sight & hidden
            mask = layer_mask(
                keys,
                now.rows.layout.to(keys.device),
                window=window,
                sight=sight,
                heads=config.num_attention_heads,
                eager=eager,
                dtype=x.dtype,
            )
            if not fresh and now.given.ready_made and given is not None and mask is not None:
                mask = with_ahead(
                    mask, given if now.rows.cut is None else cut_mask(given, now.rows.cut, now.rows.layout.valid)
                )
            bias = held.bias if eager and held is not None else None  # else the store adds it itself
            if bias is not None and mask is not None:
                groups = config.num_attention_heads // bias.shape[1]
                mask[..., : bias.shape[2]] += bias.repeat_interleave(groups, 1)[:, :, None].to(x.dtype)
            now.notes.memo[key] = (keys, mask)  # holding `keys` keeps its id taken
        return now.notes.memo[key][1]


class AttentionExit:
    """Forward hook of the attention of one decoder layer: its keys and values are complete now."""

    def __init__(self, context: Context, layer: int):
        self.context, self.layer = context, layer

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        now, policy = self.context.state.forward, self.context.policy
        if now is None or now.given.cache is None or policy is None or cache_of(kwargs) is None:
            return
        held: HeldLayer = now.given.cache.layers[self.layer]
        record = (
            now.notes.records.get(self.layer)
            if self.context.decoder_method
            else now.notes.records.pop(self.layer, None)
        )
        if now.given.reread is not None and record is not None:
            now.given.reread.read(self.layer, held, record)
        elif self.context.probe.again:
            return  # scored and evicted when the whole prompt is done
        elif now.given.past == 0:
            if held.layout is None:
                raise untaken(self.context, f"the attention of layer {self.layer} put nothing into the KV cache")
            rotary = self._rotary(now, module, kwargs)
            views, content = now.notes.views, now.notes.content
            sums = now.notes.received.pop(self.layer, None)
            policy.after_prompt(now.given.cache, self.layer, held.layout, record, rotary, content, views, sums=sums)
            now.notes.settled.add(self.layer)
        elif record is not None:
            row = now.notes.received.pop(self.layer, None)
            policy.steps.after(held, now.rows.layout.to(record[1].device), record, row)

    def _rotary(self, now: Forward, module: nn.Module, kwargs: dict[str, Any]) -> Rotary | None:
        """Rotations of this layer's rows, where the attention is given them."""
        tables = kwargs.get("position_embeddings")
        function = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if tables is None or function is None:
            return None
        if self.context.adapter.rotates(module):
            return Rotary(tables, function, lambda count: self._ahead(now, count))
        cos, sin = torch.ones_like(tables[0]), torch.zeros_like(tables[1])
        return Rotary((cos, sin), function, lambda count: (cos[:, :1].float(), sin[:, :1].float()))

    def _ahead(self, now: Forward, count: int) -> tuple[Tensor, Tensor]:
        """Mean cos and sin (B or 1, 1, d) over the `count` positions after the prompt, fp32, once per kind of layer."""
        decoder = self.context.decoder
        rotary: Any = decoder.rotary_emb
        kinds = "layer_type" in inspect.signature(rotary.forward).parameters
        kind = [decoder.config.layer_types[self.layer]] if kinds else []
        key = ("ahead", *kind, count)
        if key not in now.notes.memo:
            first = now.given.next_position().to(now.rows.local.device)
            at = first[:, None] + torch.arange(count, device=first.device)
            probe = torch.zeros(1, dtype=torch.float32, device=at.device)  # says the device and the precision
            own = copy.deepcopy(rotary, {id(rotary.config): rotary.config})  # some kinds adapt to the positions asked
            now.notes.memo[key] = tuple(t.mean(1, keepdim=True) for t in own(probe, at, *kind))
        return now.notes.memo[key]


class PartExit:
    """Forward hook of the attention, or of the MLP, of one decoder layer: how it changes the rows."""

    def __init__(self, context: Context, layer: int):
        self.context, self.layer = context, layer

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        now = self.context.state.forward
        if now is None or self.layer not in now.notes.changing:
            return
        x, y = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
        now.notes.changes.append(_change(x.detach(), y.detach()))


@own_precision
@torch.no_grad()
def _change(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How long rows y (B, S, D) are over x, and their cosine: (B, S) fp32 each."""
    x, y = x.float(), y.float()
    return y.norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-12), F.cosine_similarity(x, y, dim=-1)
