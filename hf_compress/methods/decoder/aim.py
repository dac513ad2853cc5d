"""AIM: visual tokens are merged before the language model and pruned on a ramp through its second half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress import budget
from hf_compress.methods.base import DecoderMethod, Part, VisionMethod, check_choice, check_count, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, DecoderView, Read, Tokens
from hf_compress.tensors.merge import bipartite, by_first, group_sum
from hf_compress.tensors.select import identity


@register("aim", stage="decoder", kind="merging", paper="arXiv:2412.03248", needs={"visual", "columns"})
@dataclass
class AIM(DecoderMethod):
    """Similar visual tokens are merged before the language model, the rest pruned on a ramp by PageRank.

    Every image is halved by bipartite matching of its embeddings, once or more, until the wanted number is left
    (`AIMMerge`). Layer l of T then keeps 1 - 3.5 (l - T/2) / T of these, none at the end (14 to 22 of 28 layers in the
    paper): those of highest importance, sqrt(mean over heads of p^2), where p (B, H, S) is what a uniform weight of
    the rows of the prompt becomes after `steps` products with the attention map, its logits divided by `temperature`.
    Text rows count in p and stay; the row that the answer is predicted from stays even if it is visual.

    `ratio` is the fraction removed, averaged over layers: the ramp is the published one, and merging does the rest; of
    less than the ramp alone removes nothing is merged, and the ramp begins later. The release masks what is pruned and
    computes full lengths, and its code leaves single images unmerged; here rows are gone, and images are merged too.

    On the built-in LLaVA (400 questions) 90.8, 87.0 and 83.2 % are right with 75, 89 and 94 % removed (random: 74.5,
    53.2 and 40.1); with half removed it is within the interval of random (93.2 and 91.2 %).

    Source: AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning, ICCV 2025, arXiv:2412.03248.
    Cost: O(N^2 D / 4) for the matching; per layer of the ramp `steps` products of the queries and keys of all rows, in
    blocks, never a map. `importance="last_row"` takes the row of the last prompt token instead, for next to nothing.

    Args:
        importance: "pagerank" or "last_row".
        steps: products with the map.
        temperature: what logits are divided by.

    Raises:
        ValueError: a knob is none of its values.
    """

    importance: str = "pagerank"
    steps: int = 5
    temperature: float = 0.1

    example = {"ratio": 0.4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("importance", self.importance, ("pagerank", "last_row"))
        check_count("steps", self.steps)
        check_number("temperature", self.temperature, 0, above=True)

    def parts(self, layers: int, tokens: int | None, ratio: Fraction | None, keep: int | None) -> Mapping[str, Part]:
        """Merging to the share that the published ramp leaves to be removed, and the ramp."""
        ramp = _mean(Fraction(layers, 2), layers)
        if ratio is None:
            assert keep is not None
            merged_to = max(1, round(keep / ramp))
            merged_to = merged_to if tokens is None else min(merged_to, tokens)
            return {"vision": (AIMMerge(), None, merged_to), "decoder": (self, None, keep)}
        merged = min(Fraction(1), (1 - ratio) / ramp)
        left = ramp if merged < 1 else 1 - ratio
        return {"vision": (AIMMerge(), 1 - merged, None), "decoder": (self, 1 - left, None)}

    def boundaries(self, layers: int) -> Sequence[int]:
        return range(max(1, layers // 2 + 1), layers)

    def reads(self, depth: int) -> set[Read]:
        return {Read("layer", i - 1, "attention") for i in self.boundaries(depth)}

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        def counts(start: Fraction) -> dict[int, int]:
            return {i: (tokens * _rate(start, i, layers)).__floor__() for i in self.boundaries(layers)}

        def total(start: Fraction) -> int:
            return sum(counts(start).values())

        before = layers - len(self.boundaries(layers))
        target = layers * tokens * (1 - ratio) - before * tokens
        return counts(budget.solve(total, target, Fraction(layers, 2), Fraction(layers)))

    def removable(self, view: DecoderView) -> Tensor:
        return view.visual & ~view.speaks

    def score(self, view: DecoderView) -> Tensor:
        if self.importance == "last_row":
            return view.attention(source="own")
        weight = (view.prompt / view.prompt.sum(1, keepdim=True).clamp(min=1))[:, None].float()
        for _ in range(self.steps):
            weight = view.received(weight, source="own", sharpness=1 / self.temperature)
        return weight.square().mean(1).sqrt()


@dataclass
class AIMMerge(VisionMethod):
    """The first part of `aim`: bipartite matching, halving by halving; members that meet in a step count alike."""

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups and weights (n, N), kept (n, K): the first member of each group."""
        n, left = len(tokens), tokens.count
        groups = identity(n, left, tokens.device)
        x, weight = tokens.embeddings.detach().float(), torch.ones(n, left, device=tokens.device)
        while left > keep:
            r = min(left // 2, left - keep)
            step = bipartite(x, r)
            left -= r
            size = group_sum(torch.ones_like(x[..., 0]), step, left)
            x = group_sum(x, step, left) / size[..., None]
            groups = step.gather(1, groups)
            weight = weight / size.gather(1, groups)
        groups, kept = by_first(groups, left)
        return Assignment(kept, groups, weight)


def _rate(start: Fraction, layer: int, layers: int) -> Fraction:
    """The share of visual tokens that enters a layer, on a ramp that begins at `start`."""
    return min(Fraction(1), max(Fraction(0), 1 - Fraction(7, 2) * (layer - start) / layers))


def _mean(start: Fraction, layers: int) -> Fraction:
    return sum((_rate(start, i, layers) for i in range(layers)), Fraction(0)) / layers
