"""At every decoder layer: drop rows, give the layer its own mask and rotary rows; after its attention, evict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_compress.engine.decoder import LayerView, drop
from hf_compress.engine.masks import cut_mask, layer_mask, with_ahead
from hf_compress.engine.state import Forward
from hf_compress.layout import compact, take
from hf_compress.stores import HeldLayer

if TYPE_CHECKING:
    from hf_compress.engine.runtime import Compression


class LayerEntry:
    """Pre-hook of one decoder layer."""

    def __init__(self, owner: Compression, layer: int):
        self.owner, self.layer = owner, layer

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self.owner.state.forward
        if now is None or not now.size[1]:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        if self.layer in now.plan:
            x = self._drop(now, x, kwargs)
        held = now.cache.layers[self.layer] if now.cache is not None else None
        if now.past and held is not None and self.owner.policy is not None:
            self.owner.policy.before_step(held, self.layer)
        kw = dict(kwargs, attention_mask=self._mask(now, held, x, kwargs.get("attention_mask")))
        if now.cut is not None:
            kw["position_embeddings"], kw["position_ids"] = self._positions(now, kwargs)
        if held is not None:
            held.announce(now.layout)
        now.held.append(now.layout)
        now.records.pop(self.layer - 2, None)  # the layer just run may still be asked for its attention
        if args:
            return (x, *args[1:]), kw
        return args, dict(kw, hidden_states=x)

    def _drop(self, now: Forward, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        assert self.owner.drops is not None
        rotary, _ = self._positions(now, kwargs)
        view = LayerView(now, self.owner.adapter, self.owner.decoder, self.layer, x, rotary)
        keep = drop(self.owner.drops, view, now.plan[self.layer])
        check_labels(now, view.valid & ~keep)
        rows, valid = compact(keep)
        here = rows.to(now.local.device)  # the book stays where the rows came in, layers may lie elsewhere
        now.layout, now.local = now.layout.gather(here, valid.to(here.device)), now.local.gather(1, here)
        now.cut = here if now.cut is None else now.cut.gather(1, here)
        now.records.clear()
        return take(x, rows)

    def _positions(self, now: Forward, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Rotary rows and position ids of the rows alive, gathered once per change and kind of layer."""
        tables, ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        cut = now.cut
        if cut is None:
            return tables, ids
        key = (id(cut), id(tables[0]))  # sliding and full layers may rotate differently
        if key not in now.memo:
            B = cut.shape[0]
            rotary = tuple(take(t.expand(B, -1, -1), cut.to(t.device)) for t in tables)
            if ids is not None:  # (B, S), or M-RoPE positions (3, B, S)
                at = cut.to(ids.device).expand(*ids.shape[:-2], -1, -1)
                ids = ids.expand(*ids.shape[:-2], B, -1).gather(-1, at)
            now.memo[key] = (cut, tables, (rotary, ids))  # holding `cut` and `tables` keeps their ids taken
        return now.memo[key][-1]

    def _mask(self, now: Forward, held: HeldLayer | None, x: Tensor, given: Tensor | None) -> Tensor | None:
        owner, fresh = self.owner, held is None or held.layout is None
        window = owner.adapter.window(owner.decoder, self.layer)
        if fresh and now.cut is None and (window is None or owner.renumber or owner.vision is None or now.ready_made):
            return given  # the model's own mask fits
        if fresh and now.cut is not None and now.ready_made and given is not None:
            return cut_mask(given, now.cut, now.layout.valid)
        eager = owner.decoder.config._attn_implementation == "eager"
        if not eager and window is None and now.size[1] == 1 and now.layout.all_valid and not fresh:
            assert held is not None and held.layout is not None
            if held.layout.all_valid:
                return None  # one query that sees every slot: nothing to look up
        recent = None
        if not fresh and owner.evicts is not None and held is not None and held.budget is not None and now.size[1] > 1:
            recent = owner.evicts.recent(held.budget)
        keys = now.layout if fresh else held.next_layout(now.layout)  # type: ignore[union-attr]
        key = (id(keys), window, recent is None)
        if key not in now.memo:
            config = owner.decoder.config
            mask = layer_mask(
                keys,
                now.layout.to(keys.device),
                window=window,
                recent=recent,
                heads=config.num_attention_heads,
                eager=eager,
                dtype=x.dtype,
            )
            if not fresh and now.ready_made and given is not None and mask is not None:
                mask = with_ahead(mask, given if now.cut is None else cut_mask(given, now.cut, now.layout.valid))
            now.memo[key] = (keys, mask)  # holding `keys` keeps its id taken
        return now.memo[key][1]


class AttentionExit:
    """Forward hook of the attention of one decoder layer: its keys and values are complete now."""

    def __init__(self, owner: Compression, layer: int):
        self.owner, self.layer = owner, layer

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        now, policy = self.owner.state.forward, self.owner.policy
        if now is None or now.cache is None or policy is None or kwargs.get("past_key_values") is None:
            return
        held: HeldLayer = now.cache.layers[self.layer]
        record = now.records.get(self.layer)
        if now.past == 0:
            assert held.layout is not None
            policy.after_prompt(held, self.layer, held.layout, record)
        elif record is not None:
            policy.after_step(held, now.layout.to(record[1].device), record)


def check_labels(now: Forward, gone: Tensor) -> None:
    """Raises ValueError if a row that is removed carries a label; `gone` (B, S) bool over the rows alive."""
    labels = now.inputs.get("labels")
    if labels is None or not torch.is_tensor(labels) or labels.shape[1] != now.size[1]:
        return
    if bool((labels.to(gone.device).gather(1, now.local.to(gone.device)).ne(-100) & gone).any()):
        raise ValueError(
            "labels: some visual tokens that are removed carry a label; set the labels of visual placeholders to -100"
        )
