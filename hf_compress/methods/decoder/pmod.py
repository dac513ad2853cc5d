"""p-MoD: fewer and fewer visual rows take a layer, chosen by a trained router; the others wait (arXiv:2412.04449)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_compress import budget
from hf_compress.methods.base import DecoderMethod
from hf_compress.registry import register
from hf_compress.signals import Assignment, DecoderView, Read

LEAST, WHOLE = 0.15, 0.85  # the smallest share of a layer; from which share on a layer is left as it is
SPAN = 0.2  # how far gates lie from 1 at most


@register("pmod", stage="decoder", kind="skipping", paper="arXiv:2412.04449", needs={"visual"})
@dataclass
class PMoD(DecoderMethod):
    """Visual rows take a layer or wait behind it, by a router of each layer; deeper layers take fewer.

    Layer l of T takes the share cos(pi l / (T - 1)) / 2 + 1/2 of the V visual rows, at least .15; from .85 on it takes
    all, and is left as it is. Which, the router says: r = w_l . x + b_l of the rows x (B, S, D) that enter, the highest
    go. A gate g = 1 + .2 tanh(r) lets it learn: rows that go attend among themselves and to text, and come out as u + g
    MLP(u), u being what attention has left; rows that wait come out as g x. Text takes every layer, with g = 1. The
    cache of a layer holds the rows that took it. The cosine is shifted along the layers so that the shares meet `ratio`
    (.4625 is the authors' own), rows that rounding leaves over are spread evenly.

    The router begins at 0, as in the release: any choice is as good, so it has to be trained with the language model.
    Where several rows are alike the earlier ones go.

    Source: p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay, ICCV 2025, arXiv:2412.04449
    (MCG-NJU/p-MoD). Cost: one product per row and layer.

    Raises:
        ValueError: the ratio is above .85.
    """

    waits: ClassVar[bool] = True
    gates: ClassVar[str] = "mlp"
    needs_weights: ClassVar[bool] = True
    example = {"ratio": 0.4}

    def boundaries(self, layers: int) -> Sequence[int]:
        return range(layers)

    def reads(self, depth: int) -> set[Read]:
        return set()

    def module(self, model: nn.Module) -> nn.Module:
        """The routers of all layers: D channels to one number each."""
        config = model.config.get_text_config()
        routers = nn.Linear(config.hidden_size, config.num_hidden_layers)
        for parameter in routers.parameters():
            nn.init.zeros_(parameter)
        return routers

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        target = round(layers * tokens * (1 - ratio))
        low, high = -float(layers), float(layers)  # everything, and as little as can be
        if sum(counts(layers, tokens, high)) > target:
            raise ValueError(
                f"ratio={float(ratio):.4g}: layers take at least {LEAST} of all rows; reachable is 0 <= ratio <= 0.85"
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(counts(layers, tokens, middle)) > target else (low, middle)
        found = counts(layers, tokens, high)
        room = [tokens - n if n < tokens else 0 for n in found]
        more = budget.shares(target - sum(found), [1] * layers, room)
        return {layer: n + extra for layer, (n, extra) in enumerate(zip(found, more))}

    def score(self, view: DecoderView) -> Tensor:
        return routed(view)

    def gate(self, view: DecoderView, answer: Assignment) -> Tensor:
        return torch.where(view.visual, 1 + SPAN * routed(view).tanh(), 1.0)


def routed(view: DecoderView) -> Tensor:
    """(B, S) what the router of the layer says of its rows."""
    assert view.module is not None
    out: Tensor = view.module(view.hidden)[..., view.layer].float()
    return out


def counts(layers: int, tokens: int, shift: float) -> list[int]:
    """How many of `tokens` rows each layer takes when the cosine is moved to earlier layers by `shift` of them."""
    out = []
    for layer in range(layers):
        place = min(max((layer + shift) / max(1, layers - 1), 0.0), 1.0)
        share = max(LEAST, math.cos(math.pi * place) / 2 + 0.5)
        out.append(tokens if share > WHOLE else max(1, int(tokens * share)))
    return out
