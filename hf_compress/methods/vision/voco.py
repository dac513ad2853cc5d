"""VoCo-LLaMA: the language model itself compresses an image into a few of its rows, and text looks at nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_compress.methods.base import VisionMethod
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens

__all__ = ["VoCo"]


@register("voco", stage="vision", kind="trained", paper="arXiv:2406.12275", needs={"visual"})
@dataclass
class VoCo(VisionMethod):
    """Text sees the last K tokens of an image alone, which see all of it; the others leave the cache behind the prompt.

    All N tokens of an image go through the language model, in their places. To the last K of them a trained vector is
    added; what follows the image is shown these K alone, so that the language model has to write into them what text
    will ask for. At the end of the prompt the N - K others leave the cache: K entries serve every later question and
    turn, and further images. The prompt costs what it did, decoding and memory what K tokens cost. A video is
    compressed frame by frame. Trained with another K at every step one checkpoint serves every budget. Cost O(K * D),
    and a mask of rows times rows, with which the attention of a prompt takes about twice its time.

    Source: "VoCo-LLaMA: Towards Vision Compression with Large Language Models", CVPR 2025, arXiv:2406.12275
    (Yxxxb/VoCo-LLaMA). There K further tokens, whose embedding is one trained row of the vocabulary, stand behind the
    image; here the last tokens of the image take their part, as a prompt keeps its length, and what they show is not
    lost. As in the paper text sees what stands in front of the image; in the code, which puts the image in front of
    everything, it does not. The divergence from the uncompressed model, which the paper names and its code leaves out,
    is `compress(..., distill=)`. The released code keeps the image in the cache.

    Raises:
        ValueError: `positions` is none of its values, or a number. Also: decoder or cache methods beside it; in
            generate(): a static cache, or a prompt in chunks.
    """

    needs_weights: ClassVar[bool] = True
    passes: ClassVar[bool] = True
    scope: ClassVar[str] = "image"

    def module(self, model: nn.Module) -> nn.Module:
        """The vector."""
        return Mark(model.config.get_text_config().hidden_size)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The last tokens, (n, K)."""
        last = torch.arange(tokens.count - keep, tokens.count, device=tokens.device)
        return Assignment(last.repeat(len(tokens), 1))

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        """(n, K, D): these tokens, marked."""
        assert tokens.module is not None
        out: Tensor = tokens.module(assignment.pick(tokens.embeddings))
        return out


class Mark(nn.Module):
    """See `VoCo`."""

    def __init__(self, width: int):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return x + self.vector
