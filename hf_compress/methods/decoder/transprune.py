"""TransPrune: what layers change most, and what the instruction looks at, stays (arXiv:2507.20630)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.methods.base import DecoderMethod, check_layers
from hf_compress.methods.question import behind_images
from hf_compress.registry import register
from hf_compress.signals import DecoderView, Read

PUBLISHED = (0.875, 0.625, 0.125)  # the share of visual tokens behind the three cuts


@register("transprune", stage="decoder", kind="dropping", paper="arXiv:2507.20630", needs={"visual"})
@dataclass
class TransPrune(DecoderMethod):
    """Three cuts by how much layers change each visual token, in length and direction, and what instructions look at.

    Of the attention and of the MLP of a layer, x (S, D) what goes in (behind the norm) and y what comes out, a row j
    has the transition (|y_j| / |x_j|) w_j, w the softmax of 1 - cos(x, y) over the prompt. Before a cut the transitions
    of both parts, of all layers from the one before the first cut on, are summed; the attention of the text behind the
    last image, mean over heads and rows, is read from the queries and keys of the layer about to run. Both are scaled
    to a sum of 1 over the visual rows; those with the highest sums stay.

    Cuts are made before layers 7, 9 and 12 of 32, in proportion in other models, to .875, .625 and .125 of the visual
    tokens, or to powers of these by one exponent, so that the mean over layers meets `ratio`. Positions are kept.

    The release takes the softmax over all samples of a batch together and numbers rows anew behind every cut. The paper
    has 1 - |cos|, its code 1 - cos.

    On the built-in LLaVA (100 questions) 100 and 84 % are right with 50 and 75 % removed (random: 94 and 74).

    Source: TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model, CVPR 2026, arXiv:2507.20630.
    Cost: two norms and a product per row and part of the layers between the cuts; per cut the attention rows of the
    text, and norm, projection and rotation of the keys of all rows.

    Args:
        layers: one to three first short layers, ascending; default 7, 9 and 12 of 32, in proportion. Fewer than three
            take the shares behind the last cuts.

    Raises:
        ValueError: a knob is none of its values, or the ratio is out of reach of these cuts.
    """

    layers: Sequence[int] | None = None

    source = "next"
    example = {"ratio": 0.4}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            check_layers("layers", self.layers)
            self.layers = tuple(self.layers)
            if len(self.layers) > 3:
                raise ValueError(f"layers={self.layers!r} must be at most three layers, one for each cut")

    def boundaries(self, layers: int) -> Sequence[int]:
        if self.layers is None:
            first = max(1, round(Fraction(7 * layers, 32)))
            second = max(first + 1, round(Fraction(9 * layers, 32)))
            at: Sequence[int] = (first, second, max(second + 1, round(Fraction(12 * layers, 32))))
        else:
            at = self.layers
        if at[-1] >= layers:
            raise ValueError(f"layers={self.layers!r} does not fit a decoder of {layers} layers; name others")
        return at

    def reads(self, depth: int) -> set[Read]:
        at = self.boundaries(depth)
        return {Read("layer", i, "changes") for i in range(at[0] - 1, at[-1])}

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        at = self.boundaries(layers)

        def counts(knob: Fraction) -> list[int]:
            """From one row (0) over the published shares (1/2) to everything (1)."""
            power = float((1 - knob) / knob) if knob else torch.inf
            return [max(1, round(tokens * share**power)) for share in PUBLISHED[-len(at) :]]

        return budget.cuts(at, layers, tokens, ratio, counts)

    def score(self, view: DecoderView) -> Tensor:
        summed = view.memory.get("transition", torch.zeros_like(view.valid, dtype=torch.float32))
        for ratio, cosine in view.changes:
            summed = summed + transition(ratio, cosine, view.prompt)
        view.memory["transition"] = summed
        asked = view.attention(source=self.source, voters=behind_images(view))
        return _shares(summed, view.removable) + _shares(asked, view.removable)


def transition(ratio: Tensor, cosine: Tensor, prompt: Tensor) -> Tensor:
    """(B, S) from the changes of one part; `prompt` (B, S) bool are the rows of each sample: no answer counts."""
    change = (1 - cosine).masked_fill(~prompt, torch.finfo(cosine.dtype).min)  # of a sample without any all are alike
    return ratio * change.softmax(-1)


def _shares(x: Tensor, among: Tensor) -> Tensor:
    """(B, S) scaled to a sum of 1 over some rows of each sample."""
    total = (x * among).sum(1, keepdim=True)
    return x / total.clamp(min=torch.finfo(x.dtype).tiny)
