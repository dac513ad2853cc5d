"""Oryx: cells averaged, and what their mean looks at in them added."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.methods.cells import CellMethod
from hf_compress.modules.attention import zero
from hf_compress.registry import register
from hf_compress.tensors.cells import Cells, means, members

__all__ = ["Oryx"]

CHANNELS = 256  # of queries and keys


@register("oryx", stage="vision", kind="trained", paper="arXiv:2409.12961", needs={"visual"})
@dataclass
class Oryx(CellMethod):
    """K means of cells, each joined by what it looks at in its cell: one training, any number of tokens.

    p is the mean of a cell of projected tokens (n, N, D); with q = W p and k = V x in 256 channels the output is half
    the sum of p and of softmax(q . k / 16) over the cell times its tokens. W begins at zero: the outputs are then the
    means. Cost O(N * D * 256).

    Source: "Oryx MLLM: On-Demand Spatial-Temporal Understanding at Arbitrary Resolution", ICLR 2025, arXiv:2409.12961
    (Oryx-mllm/Oryx). There the sum is not halved, as its projector, which follows, is trained with it: a cell of one
    token comes out doubled. Ours stands behind a projector that is there already. Its cells are 1, 2 x 2 or 4 x 4
    tokens, by what the image is; ours are any K (`tensors.cells`), the same where they divide the grid.
    """

    def module(self, model: nn.Module) -> nn.Module:
        """The two maps."""
        return Regions(model.config.get_text_config().hidden_size)


class Regions(nn.Module):
    """See `Oryx`."""

    def __init__(self, width: int):
        super().__init__()
        self.query, self.key = zero(nn.Linear(width, CHANNELS)), nn.Linear(width, CHANNELS)

    def forward(self, x: Tensor, layout: Cells) -> Tensor:
        """(n, N, D) to (n, K, D)."""
        mean, (at, real) = means(x, layout), members(layout)
        logits = self.key(x)[:, at] @ self.query(mean)[..., None] * CHANNELS**-0.5  # (n, K, S, 1)
        share = logits.masked_fill(~real[..., None], -torch.inf).softmax(-2)
        return (mean + (share.mT @ x[:, at])[:, :, 0]) / 2
