"""Super tokens: what the cells of an image share, sampled by soft membership."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.methods.base import check_count
from hf_compress.methods.cells import CellMethod
from hf_compress.modules.attention import Attention
from hf_compress.registry import register
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.cells import Cells, means

__all__ = ["STS"]

AROUND = 9  # cells of which each token is a member: its own and those around it


@register("sts", stage="vision", kind="trained", paper="arXiv:2211.11167", needs={"visual"})
@dataclass
class STS(CellMethod):
    """K super tokens: means of the tokens around each of K cells, weighted by likeness, which then read each other.

    A super token begins as the mean of its cell. The affinity of a token to the super tokens of its own cell and those
    around it is softmax(x . s / sqrt(D)) of normed tokens, in fp32; places outside of the grid take part as zeros,
    as in the code. Then the super token is the mean of the tokens (n, N, D) by their affinity, `steps` times, and
    one layer of attention over the K follows, which begins as the identity. Cost O(N * K * D).

    Source: "Vision Transformer with Super Token Sampling", CVPR 2023, arXiv:2211.11167 (hhb072/STViT). There a block of
    the encoder samples super tokens, attends over them and maps them back to all tokens; as a compressor we return the
    super tokens, of the projected tokens, so that every tower will do. Its cells are squares; ours are any K
    (`tensors.cells`), which are the same where they divide the grid.

    Args:
        steps: rounds of affinity and mean.

    Raises:
        ValueError: `steps` is no integer of at least 1, or `positions` none of its values.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)

    def module(self, model: nn.Module) -> nn.Module:
        """What norms the tokens, and the attention."""
        return SuperTokens(model.config.get_text_config().hidden_size, self.steps)


class SuperTokens(nn.Module):
    """See `STS`."""

    def __init__(self, width: int, steps: int):
        super().__init__()
        self.steps, self.norm, self.attention = steps, nn.LayerNorm(width), Attention(width)

    def forward(self, x: Tensor, layout: Cells) -> Tensor:
        """(n, N, D) to (n, K, D)."""
        share = affinity(self.norm(x), layout, self.steps)
        mean: Tensor = self.attention(weighted(share, x).to(x.dtype))
        return mean


@own_precision
def affinity(x: Tensor, layout: Cells, steps: int = 1) -> Tensor:
    """(n, N, K) fp32: how much each token (n, N, D) belongs to each super token, after `steps` rounds."""
    x, near = x.float(), layout.near
    s = means(x, layout)
    outside = (AROUND - near.sum(1)).clamp(min=0).log()[layout.groups]  # so many places with the logit 0
    for step in range(steps):
        logits = (x @ s.mT * x.shape[-1] ** -0.5).masked_fill(~near[layout.groups], -torch.inf)
        share = torch.cat([logits, outside.expand(len(x), -1)[..., None]], -1).softmax(-1)[..., :-1]
        if step + 1 < steps:
            s = weighted(share, x)
    return share


@own_precision
def weighted(share: Tensor, x: Tensor) -> Tensor:
    """(n, K, D) fp32: the mean of the tokens (n, N, D) by their affinity (n, N, K)."""
    x = x.float()
    return share.mT @ x / share.sum(1)[..., None]
