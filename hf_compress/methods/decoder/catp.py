"""CATP: images of demonstrations and of the question thin out before and inside the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.methods.base import DecoderMethod, Part, VisionMethod, check_count, check_number
from hf_compress.methods.question import asked, behind_images, of_sample
from hf_compress.registry import register
from hf_compress.signals import QUESTION, Assignment, DecoderView, Read, Tokens
from hf_compress.tensors.diversity import facilities
from hf_compress.tensors.rows import best_rows


@register("catp", stage="decoder", kind="dropping", paper="arXiv:2508.07871", needs={"visual"})
@dataclass
class CATP(DecoderMethod):
    """For prompts of demonstrations and a question: images thin out before the language model, then by what it reads.

    1. Before the language model every image keeps what represents it and resembles its text (`CATPFirst`). 2. Before
    layer `layer` the rows c of all images but the last one are ranked together by max(0, A_1[c] - A_0[c]) +
    `context` cos(h_c, q): A_1 and A_0 (S,) what the last prompt row attends to in the layer just run and in the one
    before, mean over heads, h (S, D) the states that enter, q their mean over the last image and the text behind it.
    3. One layer later the rows of the last image are ranked by cos(h, d), d the mean state of what is left of the other
    images. Of both the same share goes; half of what is to go in all goes in 1, so that with R = ratio / (1 - (layer +
    1) / (2 T)) of T layers images have 1 - R / 2 up to `layer`, and 1 - R behind.

    With `keep=` on models whose images have any number of tokens all that is to go goes inside the language model. A
    prompt with one image has no demonstrations, which the paper does not speak of: step 2 ranks its rows by A_1 alone,
    and takes all that is to go.

    On the built-in LLaVA (100 questions on one image each, cut before layer 2 of 6) 100 % are right with 50 % removed
    (random: 94), on the built-in Qwen2.5-VL 93 % (93). With both terms of step 2 a lone image has 57 % on LLaVA, with
    the first one alone 98 %, and 88 % on Qwen2.5-VL.

    Source: "Unlocking the power of multi-modal LLMs for in-context learning by contextually adaptive token pruning"
    (CATP), AAAI 2026, arXiv:2508.07871; no code is known. Cost: O(N^2 D) and K N^2 additions per image for K of N
    tokens; one attention row of two layers, and cosines.

    Args:
        layer: where step 2 cuts; default 7 of 32, in proportion.
        relevance: what the likeness to the text counts in step 1.
        context: what the likeness to the question counts in step 2.

    Raises:
        ValueError: a knob is none of its values, or the ratio is out of reach.
    """

    layer: int | None = None
    relevance: float = 0.7
    context: float = 0.6

    back = 1
    example = {"ratio": 0.4, "layer": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_count("layer", self.layer, least=2)
        check_number("relevance", self.relevance, 0)
        check_number("context", self.context, 0)

    def first(self, layers: int) -> int:
        """Where step 2 cuts."""
        at = self.layer or max(2, round(Fraction(7 * layers, 32)))
        if at >= layers:
            raise ValueError(f"layer={self.layer!r} does not fit a decoder of {layers} layers; name another one")
        return at

    def parts(self, layers: int, tokens: int | None, ratio: Fraction | None, keep: int | None) -> Mapping[str, Part]:
        """Half of what is to go before the language model, the rest inside."""
        whole = 1 - Fraction(self.first(layers) + 1, 2 * layers)
        if ratio is None:
            assert keep is not None
            if tokens is None or keep > tokens:  # nobody knows what half of it is
                return {"decoder": (self, None, keep)}
            ratio = 1 - Fraction(keep, tokens)
        half = ratio / whole / 2
        if half >= Fraction(1, 2):
            of = "" if keep is None else f"keep={keep} of {tokens} tokens: "
            raise ValueError(
                f"{of}ratio={float(ratio):.4g} cannot be reached with cuts before layers {self.first(layers)} and "
                f"{self.first(layers) + 1} of {layers}: reachable is 0 <= ratio < {float(whole):.4g}; cut earlier, or "
                "remove less"
            )
        return {
            "vision": (CATPFirst(relevance=self.relevance), half, None),
            "decoder": (self, 1 - (1 - ratio) / (1 - half), None),
        }

    def boundaries(self, layers: int) -> Sequence[int]:
        at = self.first(layers)
        return range(at, min(at + 2, layers))

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int | None]:
        """How many go before which layer depends on how many are demonstrations."""
        return dict.fromkeys(self.boundaries(layers))

    def reads(self, depth: int) -> set[Read]:
        return {Read("layer", self.first(depth) - back, "attention") for back in (1, 2)}

    def enter(self, view: DecoderView) -> None:
        view.memory["whole"] = view.removable.sum(1, keepdim=True).expand(view.valid.shape)

    def decide(self, view: DecoderView, keep: list[int] | None) -> Assignment | None:
        last = view.visual & (view.image == view.image.amax(1, keepdim=True))
        shown, free = view.visual & ~last, view.removable & ~view.speaks
        alone = ~shown.any(1, keepdim=True)  # no demonstrations
        if view.layer == self.first(view.layers):
            among = free & (shown | alone)
            now, before = (view.attention(source="own", back=back) for back in (0, 1))
            score = (now - before).clamp(min=0)
            score = score + self.context * likeness(view.hidden, behind_images(view) | last)
            score = torch.where(alone, now, score)
        else:
            among, score = free & last & ~alone, likeness(view.hidden, shown)
        stays = best_rows(score, among, self._counts(view, among, shown))
        return Assignment.selection(view.valid & ~among | stays)

    def _counts(self, view: DecoderView, among: Tensor, shown: Tensor) -> list[int]:
        """How many of the rows that may go now stay, for each sample."""
        first, behind, out = self.first(view.layers), view.layers - view.layer, []
        counts = (t.sum(1).tolist() for t in (among, view.removable, shown))
        for n, rows, others, whole, total in zip(*counts, of_sample(view, "whole"), view.budget):
            left = total - first * whole - (view.layer - first) * rows  # for this layer and all behind it
            goes = Fraction(behind * rows - left, behind)
            if view.layer == first and others and behind > 1:  # the last image goes on through one layer more
                goes = Fraction(behind * rows - left, behind * others + (behind - 1) * (rows - others)) * others
            out.append(max(min(1, n), min(n, n - round(goes))))
        return out


def likeness(x: Tensor, rows: Tensor) -> Tensor:
    """(B, S) the cosine of states (B, S, D) to their mean over some rows (B, S) bool; 0 where there are none."""
    x = x.float()
    mean = (x * rows[..., None]).sum(1, keepdim=True) / rows.sum(1)[:, None, None].clamp(min=1)
    return F.cosine_similarity(x, mean, dim=-1)


@dataclass
class CATPFirst(VisionMethod):
    """The first part of `catp`: tokens that represent their image, and are like the text behind it.

    On the embeddings (n, N, D) that the language model reads, similarities being cosines scaled to [0, 1]: greedily
    those that raise sum over tokens i of the largest similarity of i to a pick, plus `relevance` times the similarity
    of the picks to the mean embedding of the text, most. The paper takes the text of the same demonstration; here it is
    all text behind the image. Without any the image alone decides.

    Args:
        relevance: what the likeness to the text counts.
    """

    relevance: float = 0.7

    def reads(self, depth: int) -> set[Read]:
        return {QUESTION}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); ties go to the lower index."""
        x = tokens.embeddings.detach().float()
        bonus = self.relevance * (F.cosine_similarity(x, asked(tokens).float()[:, None], dim=-1) + 1) / 2
        return Assignment(facilities(x, bonus, keep).sort(dim=1).values)
