"""A small trained net that foresees from the first layer which tokens matter to the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_compress.methods.base import VisionMethod
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Tokens
from hf_compress.tensors.select import top_sorted

__all__ = ["Explainability", "Foresight", "relevance"]

DEPTH, CHANNELS, KERNEL = 5, 64, 7


@register("explainability", stage="vision", kind="trained", paper="arXiv:2506.01097", needs={"visual", "columns"})
@dataclass
class Explainability(VisionMethod):
    """The tokens that a small net foresees to matter to the answer, from the first layer's attention alone.

    1. Layer 0 of the language model runs over the whole prompt; A (n, H, N) is what each head of the text behind the
    image attends to there, mean over its rows. 2. A net of five depthwise-separable convolutions along the tokens (all
    crops of an image in one sequence) makes scores (n, N) of it: `Foresight`. 3. The highest stay, in raster order. Its
    weights have to be trained: on the `relevance` of the visual tokens to answers, by the Kullback-Leibler divergence,
    as `recipes/explainability` does. Cost: one layer of the language model over the whole prompt, O(R * S) per head for
    R rows of text, and O(N * channels^2) of the net.

    Source: "Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective",
    arXiv:2506.01097, which has no code. It gives neither widths nor kernels: ours are 64 channels and kernels of 7. The
    net adds to the logarithm of the head mean, which is what a new one gives.

    Raises:
        ValueError: `positions` is none of its values.
    """

    scope: ClassVar[str] = "image"
    needs_weights: ClassVar[bool] = True

    def module(self, model: nn.Module) -> nn.Module:
        return Foresight(model.config.get_text_config().num_attention_heads)

    def reads(self, depth: int) -> set[Read]:
        return {Read("layer", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K) of the highest scores; ties go to the lower index."""
        assert tokens.module is not None
        return Assignment(top_sorted(tokens.module(tokens.looked_at(0, "text")), keep))


class Foresight(nn.Module):
    """(n, H, N) attention of text on visual tokens to (n, N) fp32: the logarithm of their relevance, up to a constant.

    Each of the five layers is a convolution along the tokens, head by head or channel by channel, and a mixture of
    these. The last one starts at 0, so that a new net gives the logarithm of the mean over heads.
    """

    def __init__(self, heads: int):
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in pairwise([heads, *[CHANNELS] * (DEPTH - 1), 1]):
            along, mix = nn.Conv1d(a, a, KERNEL, padding=KERNEL // 2, groups=a), nn.Conv1d(a, b, 1)
            nn.init.dirac_(along.weight, groups=a)  # else ten layers leave nothing of what enters
            nn.init.kaiming_normal_(mix.weight, nonlinearity="relu")
            layers += [along, mix, nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])
        for weight in layers[-2].parameters():
            nn.init.zeros_(weight)

    def forward(self, attention: Tensor) -> Tensor:
        tiny = torch.finfo(torch.float32).tiny
        x = attention.float()
        x = x / x.mean(-1, keepdim=True).clamp(min=tiny)  # shares: prompts of any length alike
        dtype = next(self.parameters()).dtype
        return x.mean(1).clamp(min=tiny).log() + self.layers(x.log1p().to(dtype))[:, 0].float()


def relevance(attentions: Sequence[Tensor], gradients: Sequence[Tensor], rows: Tensor) -> Tensor:
    """What every row of a prompt means to an answer: the teacher of `Foresight`.

    The attention of each layer, times the gradient of the answer with respect to it, its negative part left out, mean
    over heads, is added to the identity; the layers are multiplied, the first one innermost.

    Args:
        attentions, gradients: (H, L, L) per layer, first layer first; rows: (R,) those that the answer is read off.

    Returns:
        (L,) fp32, mean over `rows`. Vectors go through the layers from the last to the first: no product of matrices.
    """
    L = attentions[0].shape[-1]
    out = torch.zeros(L, device=attentions[0].device).index_fill(0, rows, 1 / len(rows))
    for a, g in zip(reversed(attentions), reversed(gradients)):
        out = out + out @ weighted(a, g)
    return out


def weighted(attention: Tensor, gradient: Tensor) -> Tensor:
    """(L, L) fp32: the positive part of (H, L, L) attention times its gradient, mean over heads."""
    return (attention.float() * gradient.float()).clamp(min=0).mean(0)
