"""How our layers get into the cache that a call brings along, and which caches cannot hold them.

Layers that keep one state, whatever they have read, or read the entries of others, have none to compress: they stay as
transformers made them.
"""

from __future__ import annotations

import weakref
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from hf_compress.layout import Layout
from hf_compress.stores.dense import HeldLayer

EMPTY = (LinearAttentionLayer, DummyLayer)


def held_layers(cache: Any) -> list[HeldLayer]:
    """Our layers in a cache, in order: those that keep entries; [] of any other cache, and of none."""
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, HeldLayer)]


def layout_of(cache: Any) -> Layout | None:
    """Layout of a layer of a compressed cache: of one that sees everything, if there is one."""
    if not (layers := held_layers(cache)):
        return None
    return next((layer for layer in layers if layer.window is None), layers[0]).layout


def ours(cache: Any, filled_by: str) -> bool:
    """Whether a cache holds our layers already, for the compression that `filled_by` names.

    Raises:
        ValueError: it cannot: another kind of cache, a layer that keeps another kind of state, or a cache that already
            holds tokens of a model that was not compressed in this way.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if type(layer) not in EMPTY]
    if layers and all(isinstance(layer, HeldLayer) and layer.filled_by == filled_by for layer in layers):
        return True
    if not isinstance(cache, DynamicCache) or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise ValueError(f"past_key_values={kind} cannot hold compressed layers; pass a DynamicCache, or none at all")
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) in EMPTY:
            continue
        if isinstance(layer, HeldLayer) and layer.filled_by != filled_by and layer.get_seq_length():
            raise ValueError(
                f"past_key_values was filled under {layer.filled_by or 'another compression'}, not {filled_by}; "
                "compress the model in that way again, or start a new cache"
            )
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, HeldLayer):
            raise ValueError(f"layer {i} of past_key_values is a {type(layer).__name__}, which cannot be compressed")
        if layer.get_seq_length():
            raise ValueError(
                "past_key_values already holds tokens from before compress(); compress first, or start a new cache"
            )
    return False


def adopt(cache: Any, config: Any, filled_by: str) -> None:
    """Swap the empty layers of a `DynamicCache` for ours, in place, whoever made it.

    Raises:
        ValueError: as `ours`. Nothing is changed then.
    """
    if ours(cache, filled_by):
        return
    layers = cache.layers
    if cache.layer_class_to_replicate is not None and not layers:
        layers = DynamicCache(config=config).layers
    cache.layers = [layer if type(layer) in EMPTY else _held(layer, filled_by) for layer in layers]
    held = held_layers(cache)
    siblings = [weakref.ref(layer) for layer in held]
    for layer in held:
        layer.siblings = siblings
    cache.layer_class_to_replicate = None


def _held(layer: Any, filled_by: str) -> HeldLayer:
    return HeldLayer(getattr(layer, "sliding_window", getattr(layer, "window", None)), filled_by)
