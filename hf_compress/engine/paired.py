"""What is asked of a generate() in which the compressed model runs beside the same model uncompressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import DynamicCache

from hf_compress.engine.context import Context
from hf_compress.engine.reach import enters
from hf_compress.methods.base import PixelMethod
from hf_compress.patches.versions import cache_of
from hf_compress.stores import adopt

Option = Callable[[dict[str, Any], str], Any]  # gives an option of generation by name


def check_features(context: Context, what: str) -> None:
    """Raises ValueError if the methods change the features of an image, which both of them read.

    Args:
        what: the two are doing, for the message.
    """
    for stage in context.stages.values():
        method, adapter = stage.method, context.adapter
        if enters(method, adapter, context.model) or (isinstance(method, PixelMethod) and adapter.resizable):
            raise ValueError(
                f"{what}: method={stage.name!r} acts before the features of an image are there, which the compressed "
                "and the uncompressed model share; use a method that acts on them (or where='output')"
            )


def check_caches(given: dict[str, Any], option: Option, assisted: str | None, what: str) -> None:
    """Raises ValueError if a generate() with these arguments does not feed a whole prompt into a dynamic cache.

    Args:
        assisted: the argument that asks for candidates, if one does.
    """
    if assisted is not None:
        raise ValueError(f"{what}: {assisted} asks for candidates of another kind; leave it out")
    kinds = (None, "dynamic", "dynamic_full")
    if option(given, "prefill_chunk_size") or option(given, "cache_implementation") not in kinds:
        raise ValueError(f"{what}: the prompt is fed as a whole into dynamic caches; leave other caches and chunks out")
    if (cache := cache_of(given)) is not None and cache.get_seq_length():
        raise ValueError(
            f"{what}: past_key_values holds tokens that the compressed model has not seen; pass the whole conversation "
            "anew"
        )


def own_cache(context: Context) -> DynamicCache:
    """An empty cache for the compressed model alone."""
    cache = DynamicCache(config=context.decoder.config)
    adopt(cache, context.decoder.config, context.name)
    return cache
