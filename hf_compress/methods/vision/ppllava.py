"""PPLLaVA: windows of frames pooled by what the question looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.methods.base import VisionMethod, check_count, check_number
from hf_compress.methods.question import asked
from hf_compress.modules.attention import heads
from hf_compress.registry import register
from hf_compress.signals import QUESTION, Assignment, Read, Tokens
from hf_compress.tensors.cells import windows
from hf_compress.tensors.merge import group_softmax

__all__ = ["PPLLaVA"]

CLIP = 100  # what CLIP multiplies its cosines by


@register("ppllava", stage="vision", kind="trained", paper="arXiv:2411.02327", needs={"visual"})
@dataclass
class PPLLaVA(VisionMethod):
    """K windows of a video, or cells of an image, each pooled by how much its tokens are like the question.

    With g the mean of the embedded text behind the images and x (n, T * N, D) the projected tokens, p = softmax of
    100 s cos(U g, V x) over all tokens of the video; in a window of `depth` frames and a cell of the grid the weights
    of the tokens are softmax(p / `temperature`), the output is their mean of x, in the slot of the middle one. s begins
    at zero: outputs are then plain means. Cost O(T * N * D * c), c <= 512 channels. Outputs follow the question.

    Source: "PPLLaVA: Varied Video Sequence Understanding With Prompt Guidance", arXiv:2411.02327 (farewellthree/
    PPLLaVA). There the question and the image meet in the joint space of CLIP, which a model need not have; here U, V
    and s are trained. As in its code there are two softmaxes: p of one of many tokens is small, so that the pooling is
    all but plain unless a token stands out. Windows of 2 x 3 x 3 there; here any K (`tensors.cells.windows`).

    Args:
        depth: frames of a window; more of them where the budget is less than a token each.
        temperature: p is divided by it.

    Raises:
        ValueError: `depth` is no integer of at least 1, `temperature` no number above 0, or `positions` none of its
            values.
    """

    depth: int = 2
    temperature: float = 0.01

    needs_weights: ClassVar[bool] = True
    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("depth", self.depth)
        check_number("temperature", self.temperature, 0, above=True)

    def reads(self, depth: int) -> set[Read]:
        return {QUESTION}

    def module(self, model: nn.Module) -> nn.Module:
        """The maps into the joint space."""
        return Likeness(model.config.get_text_config().hidden_size)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups (n, T * N), the windows, and kept (n, K), their middle tokens."""
        layout = windows(len(tokens.grids), *tokens.grids[0], keep, self.depth, tokens.device)
        return Assignment(layout.centres.repeat(len(tokens), 1), layout.groups.repeat(len(tokens), 1))

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        """(n, K, D)."""
        assert tokens.module is not None and assignment.groups is not None
        p = tokens.module(tokens.embeddings, asked(tokens)).softmax(-1)
        weight = group_softmax(p / self.temperature, assignment.groups, assignment.kept.shape[1])
        return Assignment(assignment.kept, assignment.groups, weight).apply(tokens.embeddings)


class Likeness(nn.Module):
    """See `PPLLaVA`."""

    def __init__(self, width: int):
        super().__init__()
        inner = math.prod(heads(width))
        self.look = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner))
        self.match = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner))
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, question: Tensor) -> Tensor:
        """(n, N), fp32 at least: logits of tokens (n, N, D) for a question (n, D)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        e, g = (F.normalize(t.to(wide), dim=-1) for t in (self.match(x), self.look(question)))
        return CLIP * self.scale.to(wide) * (e * g[:, None]).sum(-1)
