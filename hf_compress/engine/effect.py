"""Whether a compression took hold: checked on the first prompt, so that no release of transformers undoes it unseen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Cache

from hf_compress.patches import versions
from hf_compress.stores import HeldLayer

if TYPE_CHECKING:
    from hf_compress.engine.runtime import Compression
    from hf_compress.engine.state import Forward


def check_signatures(owner: Compression) -> None:
    """Whether modules take by name what the hooks put there.

    Raises:
        RuntimeError: one does not.
    """
    versions.require(owner.model, "input_ids", "attention_mask")
    versions.require(owner.decoder, "input_ids", "inputs_embeds", "attention_mask", "position_ids")
    if owner.by_layer:
        for layer in owner.layers:
            versions.require(layer, "hidden_states", "attention_mask", "position_embeddings")
            versions.require(layer.self_attn, "attention_mask")


def check_prompt(owner: Compression, now: Forward, out: Any) -> None:
    """Whether the language model did with a prompt what was planned; `out` is what it gave.

    Rows and the cache are each looked at until they have been right once.

    Raises:
        RuntimeError: rows, layers or entries are others than planned.
    """
    found = None
    if "rows" not in owner.proved:
        found = _rows(owner, now, out)
        owner.proved.add("rows")
    if found is None and now.cache is not None and "cache" not in owner.proved:
        found = _cache(owner, now, out)
        owner.proved.add("cache")
    if found is not None:
        owner.proved.clear()
        raise untaken(owner, found)


def untaken(owner: Compression, found: str) -> RuntimeError:
    """The error to raise where hooks run and something else than planned is `found`."""
    kind = type(owner.model).__name__
    return RuntimeError(f"{owner.config.summary()} did not take hold of {kind}: {found}{versions.remedy()}")


def _rows(owner: Compression, now: Forward, out: Any) -> str | None:
    """What is wrong with the rows that went through the layers."""
    if out[0].shape[:2] != now.local.shape:
        return f"{tuple(out[0].shape[:2])} rows came out of the layers where {tuple(now.local.shape)} were planned"
    if owner.by_layer and len(now.held) != len(owner.layers):
        return f"{len(now.held)} of {len(owner.layers)} decoder layers called their hooks"
    for layer, counts in now.plan.items():
        left = now.visual_rows(now.held[layer])
        if left != counts:
            return f"{left} visual rows per sample entered layer {layer} where {counts} were planned"
    return None


def _cache(owner: Compression, now: Forward, out: Any) -> str | None:
    """What is wrong with the cache that comes back."""
    parts = out if isinstance(out, tuple) else tuple(out.values())
    if not any(part is now.cache for part in parts):
        others = sorted({type(part).__name__ for part in parts if isinstance(part, Cache)})
        return f"the KV cache that came back is not the one that was handed in (it gave {others or 'none'})"
    policy = owner.policy
    used = [i for i, layer in enumerate(now.cache.layers) if isinstance(layer, HeldLayer) and layer.layout is not None]
    acts = range(len(owner.layers)) if policy is None else policy.layers
    if missing := sorted(set(acts) - set(used)):
        return f"layers {missing} of the KV cache hold nothing"
    if policy is None or policy.ratio == 0 or now.past:
        return None
    if policy.method.passes:
        return None  # evicts when this forward is done
    if policy.method.evicts:
        return next((fault for i in acts if (fault := _entries(now.cache.layers[i], i))), None)
    if passed := sorted(set(acts) - now.settled):
        return f"layers {passed} of the KV cache were never packed"
    return None


def _entries(held: HeldLayer, layer: int) -> str | None:
    if held.budget is None:
        return f"layer {layer} of the KV cache was never evicted"
    assert held.layout is not None
    entries, budget = held.layout.valid.sum(-1).float().mean(), held.budget.float().mean()
    if entries > budget.to(entries.device):
        return f"layer {layer} of the KV cache holds {entries:.1f} entries per head where {budget:.1f} were planned"
    return None
