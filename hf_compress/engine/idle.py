"""Layers that a generated token does not go through: no row of the batch does, so they are not run at all."""

from __future__ import annotations

from collections.abc import Collection
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from hf_compress.engine.context import Context
from hf_compress.engine.instead import Instead
from hf_compress.engine.state import Forward
from hf_compress.stores import held_layers


def check_idle(context: Context, ratio: Fraction | None) -> None:
    """Raises ValueError if what a cache method does at every step would miss the layers that are not run.

    `ratio`: of the decoder method.
    """
    method, policy = context.decoder_method, context.policy
    if method is None or policy is None or not method.idles or ratio == 0:
        return
    if policy.stepwise or policy.method.policy == "hold":
        decoder, cache = context.stages["decoder"].name, context.stages["cache"].name
        raise ValueError(
            f"method={cache!r} acts on the cache of every layer while decoding, and method={decoder!r} leaves layers "
            "out then; take a cache method that acts on the prompt alone, with policy='grow'"
        )


def idle_layers(context: Context, now: Forward) -> Collection[int]:
    """The layers that the one row of this forward, a step behind a prompt, does not go through."""
    given, method = now.given, context.decoder_method
    if not context.idles or method is None or not given.past:
        return ()
    begin = held_layers(given.cache)[0].turn if given.prompt_rows is None else given.prompt_rows
    ratio: Fraction = context.stages["decoder"].ratio  # type: ignore[assignment]  # `check_stages` wants one
    return method.idle(len(context.layers), ratio, given.past - begin) if given.past >= begin else ()


class Idle(Instead):
    """Instance attribute `forward` of a decoder layer: its input, where no row is to go through it."""

    def __init__(self, context: Context, layer: int):
        self.layer = layer
        super().__init__(context, "forward")

    @property
    def owner(self) -> nn.Module:
        return self.context.layers[self.layer]

    @torch.compiler.disable(recursive=False)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        now = self.context.state.forward
        if now is None or self.layer not in now.notes.idle:
            return self.original(*args, **kwargs)
        now.given.cache.layers[self.layer].pass_by(now.given.size[1])
        return args[0] if args else kwargs["hidden_states"]
