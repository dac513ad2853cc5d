"""TokenPacker: coarse tokens that fetch details of their cells from several levels of the tower."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from hf_compress.methods.levels import LevelMethod
from hf_compress.modules.attention import Mlp
from hf_compress.modules.regions import RegionPooling, looked_up
from hf_compress.registry import register
from hf_compress.tensors.cells import Cells, means

__all__ = ["TokenPacker"]


@register("tokenpacker", stage="vision", kind="trained", paper="arXiv:2407.02392", needs={"visual"})
@dataclass
class TokenPacker(LevelMethod):
    """K coarse tokens, each of which asks the tokens of its own cell what it has lost, on several levels of the tower.

    The query of a cell is a map of the mean of its projected tokens (n, N, D), keys and values are maps of hidden
    states of the tower side by side, (n, N, levels * C), and every query sees its own cell alone. What comes out
    (`modules.regions`) goes through one more map; all begins as the means of the cells. Cost O(N * levels *
    C * c), c <= 512 channels of attention.

    Source: "TokenPacker: Efficient Visual Projector for Multimodal LLM", IJCV 2025, arXiv:2407.02392
    (CircleRadon/TokenPacker). There it stands in place of the projector, is trained on captions first, and gives what
    the cells look up alone, without the coarse tokens; here it follows the projector that is there and adds to its
    tokens, so that minutes suffice. Its cells are s x s, with s of training; ours are any K (`tensors.cells`), the same
    where they divide the grid, and K may be another one at every step.

    Raises:
        ValueError: `levels` are no blocks of a tower, or `positions` none of its values. On call: images whose tower
            ran elsewhere.
    """

    def tower_reader(self, model: nn.Module, width: int, depth: int) -> nn.Module:
        """What looks things up."""
        return Packer(model.config.get_text_config().hidden_size, width, len(self.backs(depth)))


class Packer(nn.Module):
    """See `TokenPacker`."""

    def __init__(self, width: int, tower: int, levels: int):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(width), RegionPooling(width, tower), Mlp(width)
        self.key, self.value = looked_up(tower, levels), looked_up(tower, levels)

    def forward(self, x: Tensor, seen: Tensor, layout: Cells) -> Tensor:
        """(n, N, D) and (n, N, levels * C) to (n, K, D)."""
        found = self.attention(self.norm(means(x, layout)), self.key(seen), self.value(seen), x, layout)
        out: Tensor = self.mlp(found)
        return out
