"""The dense, evicting cache layer, and how it gets into the cache that a call brings along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_compress.layout import Layout


class HeldLayer(DynamicLayer):
    """Keys and values of one layer with the layout of their slots.

    `get_seq_length` answers what the caller has fed, `get_mask_sizes` what is stored, as transformers' own
    sliding-window layer does. `scores` is an optional per-slot tensor (B, Hkv, S) that moves along with the slots.

    Args:
        window: of a sliding layer; older slots are dropped when the next token arrives.
        owner: identifies the compression that fills the layer; no other may continue it.
    """

    keys: Tensor  # None until the first update, as in transformers
    values: Tensor
    is_croppable = True

    def __init__(self, window: int | None = None, owner: str = ""):
        super().__init__()
        self.window, self.is_sliding, self.owner = window, window is not None, owner
        self.layout: Layout | None = None
        self.scores: Tensor | None = None
        self.budget: Tensor | None = None  # (B,) entries per head, set when the prompt was evicted
        self._announced: Layout | None = None

    def announce(self, layout: Layout) -> None:
        """What the next `update` appends; called by the engine before the layer runs."""
        self._announced = layout

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, Hkv, q, d); returns all that is stored.

        Raises:
            RuntimeError: the engine did not announce the rows: the model is no longer compressed as it was.
        """
        new, self._announced = self._announced, None
        if new is None:
            raise RuntimeError(
                "this KV cache was filled by a compressed model and cannot be continued without its compression; "
                "compress the model in the same way again, or start with a new cache"
            )
        if self.layout is not None and (n := self.held()) < len(self.layout):
            first = len(self.layout) - n
            self.keys, self.values = self.keys[:, :, first:], self.values[:, :, first:]
            self.scores = None if self.scores is None else self.scores[:, :, first:]
        self.layout = self.next_layout(new).to(key_states.device)
        out = super().update(key_states, value_states)
        if self.scores is not None:
            fresh = self.scores.new_zeros(*self.scores.shape[:2], out[0].shape[-2] - self.scores.shape[-1])
            self.scores = torch.cat([self.scores, fresh], -1)
        return out

    def next_layout(self, new: Layout) -> Layout:
        """The layout that the next attention finds when `new` rows are appended."""
        old = self.layout
        if old is None:
            return new
        if (n := self.held()) < len(old):
            old = old.tail(n)
        return old.append(new)

    def held(self) -> int:
        """Number of slots that the next attention of this layer finds."""
        if self.layout is None:
            return 0
        return len(self.layout) if self.window is None else self.layout.within(self.window)

    def nbytes(self) -> int:
        """Bytes of keys and values that are really allocated for the slots held."""
        if not self.is_initialized:
            return 0
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))

    def get_seq_length(self) -> int:
        return 0 if self.layout is None else self.layout.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held() + query_length, self.get_seq_length() - self.held()

    def select(self, slots: Tensor, valid: Tensor | None = None) -> None:
        """Evict everything but `slots` (B, Hkv, n), ascending; `valid` (same shape) marks those that only fill up."""
        assert self.layout is not None
        wide = slots[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        self.keys, self.values = self.keys.gather(2, wide), self.values.gather(2, wide)
        if self.scores is not None:
            self.scores = self.scores.gather(2, slots)
        self.layout = self.layout.gather(slots, valid)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.layout is not None:
            self.layout = self.layout.crop(-tokens_to_remove)
            if self.scores is not None:
                self.scores = self.scores[..., :tokens_to_remove]

    def _rows(self, which: Tensor) -> None:
        for name in ("scores", "budget"):
            t = getattr(self, name)
            if t is not None:
                setattr(self, name, t[which.to(t.device)])
        if self.layout is not None:
            self.layout = self.layout.rows(which)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for name in ("scores", "budget"):
            t = getattr(self, name)
            if t is not None:
                setattr(self, name, t.repeat_interleave(repeats, 0))
        if self.layout is not None:
            self.layout = self.layout.repeat(repeats)

    def reset(self) -> None:
        super().reset()
        self.layout = self.scores = self.budget = self._announced = None


def adopt(cache: Any, config: Any, owner: str) -> None:
    """Swap the empty layers of a `DynamicCache` for ours, in place, whoever made it.

    Raises:
        ValueError: another kind of cache, a layer that keeps another kind of state, or a cache that already holds
            tokens of a model that was not compressed in this way. Nothing is changed then.
    """
    if all(isinstance(layer, HeldLayer) and layer.owner == owner for layer in cache.layers) and cache.layers:
        return
    if not isinstance(cache, DynamicCache) or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise ValueError(f"past_key_values={kind} cannot hold compressed layers; pass a DynamicCache, or none at all")
    layers = cache.layers
    if cache.layer_class_to_replicate is not None and not layers:
        layers = DynamicCache(config=config).layers
    for i, layer in enumerate(layers):
        if isinstance(layer, HeldLayer) and layer.owner != owner and layer.get_seq_length():
            raise ValueError(f"past_key_values was filled under {layer.owner or 'another compression'}, not {owner}")
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, HeldLayer):
            raise ValueError(f"layer {i} of past_key_values is a {type(layer).__name__}, which cannot be compressed")
        if layer.get_seq_length():
            raise ValueError(
                "past_key_values already holds tokens from before compress(); compress first, or start a new cache"
            )
    cache.layers = [
        HeldLayer(getattr(layer, "sliding_window", getattr(layer, "window", None)), owner) for layer in layers
    ]
    cache.layer_class_to_replicate = None
