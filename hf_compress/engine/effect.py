"""Whether a compression took hold: checked on the first prompt, so that no release of transformers undoes it unseen."""

from __future__ import annotations

from typing import Any

from transformers import Cache

from hf_compress.engine.context import Context
from hf_compress.engine.state import Forward
from hf_compress.patches import versions
from hf_compress.stores import HeldLayer


def check_signatures(context: Context) -> None:
    """Whether modules take by name what the hooks put there.

    Raises:
        RuntimeError: one does not.
    """
    versions.require(context.model, "input_ids", "attention_mask")
    versions.require(context.decoder, "input_ids", "inputs_embeds", "attention_mask", "position_ids")
    if context.by_layer:
        for layer in context.layers:
            versions.require(layer, "hidden_states", "attention_mask", "position_embeddings")
            versions.require(layer.self_attn, "attention_mask")


def check_prompt(context: Context, now: Forward, out: Any) -> None:
    """Whether the language model did with a prompt what was planned; `out` is what it gave.

    Rows and the cache are each looked at until they have been right once.

    Raises:
        RuntimeError: rows, layers or entries are others than planned.
    """
    found = None
    if "rows" not in context.proved:
        found = _rows(context, now, out)
        context.proved.add("rows")
    if found is None and now.given.cache is not None and "cache" not in context.proved:
        found = _cache(context, now, out)
        context.proved.add("cache")
    if found is not None:
        context.proved.clear()
        raise untaken(context, found)


def untaken(context: Context, found: str) -> RuntimeError:
    """The error to raise where hooks run and something else than planned is `found`."""
    kind = type(context.model).__name__
    return RuntimeError(f"{context.name} did not take hold of {kind}: {found}{versions.remedy()}")


def _rows(context: Context, now: Forward, out: Any) -> str | None:
    """What is wrong with the rows that went through the layers."""
    # some models run their last layers for the last row alone where nobody asks for more
    alone = now.given.inputs.get("logits_to_keep") == 1 and out[0].shape[1] == 1
    if not alone and out[0].shape[:2] != now.rows.local.shape:
        return f"{tuple(out[0].shape[:2])} rows came out of the layers where {tuple(now.rows.local.shape)} were planned"
    if context.by_layer and len(now.rows.held) != len(context.layers):
        return f"{len(now.rows.held)} of {len(context.layers)} decoder layers called their hooks"
    given, left = now.given, now.notes.left
    entered = given.per_sample(now.rows.entered.valid, now.rows.entered)
    for layer, counts in now.notes.plan.items():
        if counts is None or context.stages["decoder"].method.picks:
            return None  # the method has decided there how many stay
        stay = [min(n, have) for n, have in zip(counts, left)]
        planned = [rows - free + n for rows, free, n in zip(entered, now.notes.left, stay)]
        found = given.per_sample(now.rows.held[layer].valid, now.rows.held[layer])
        if found != planned:
            return f"{found} rows per sample entered layer {layer} where {planned} were planned"
        left = left if context.stages["decoder"].method.waits else stay
    return None


def _cache(context: Context, now: Forward, out: Any) -> str | None:
    """What is wrong with the cache that comes back."""
    parts = out if isinstance(out, tuple) else tuple(out.values())
    if not any(part is now.given.cache for part in parts):
        others = sorted({type(part).__name__ for part in parts if isinstance(part, Cache)})
        return f"the KV cache that came back is not the one that was handed in (it gave {others or 'none'})"
    policy = context.policy
    layers = now.given.cache.layers
    used = [i for i, layer in enumerate(layers) if isinstance(layer, HeldLayer) and layer.layout is not None]
    acts = [i for i, layer in enumerate(layers) if isinstance(layer, HeldLayer)] if policy is None else policy.layers
    if missing := sorted(set(acts) - set(used)):
        return f"layers {missing} of the KV cache hold nothing"
    if policy is None or policy.ratio == 0 or now.given.past:
        return None
    if context.probe.again:
        return None  # evicts when this forward is done
    if policy.method.ranks():
        return next((fault for i in acts if (fault := _entries(layers[i], i))), None)
    if passed := sorted(set(acts) - now.notes.settled):
        return f"layers {passed} of the KV cache were never packed"
    return None


def _entries(held: HeldLayer, layer: int) -> str | None:
    if held.quota is None:
        return f"layer {layer} of the KV cache was never evicted"
    assert held.layout is not None
    entries, budget = held.layout.valid.sum(-1).float().mean(), held.quota.budget.float().mean()
    if entries > budget.to(entries.device):
        return f"layer {layer} of the KV cache holds {entries:.1f} entries per head where {budget:.1f} were planned"
    return None
