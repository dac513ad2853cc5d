"""QueCC: coarse tokens that know the question fetch what it asks for from their cells."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from hf_compress.methods.base import check_count
from hf_compress.methods.levels import LevelMethod
from hf_compress.methods.question import asked
from hf_compress.modules.attention import Mlp
from hf_compress.modules.regions import CellKernel, RegionPooling, looked_up
from hf_compress.registry import register
from hf_compress.signals import QUESTION, Assignment, Read, Tokens
from hf_compress.tensors.cells import Cells, cells

__all__ = ["QueCC"]


@register("quecc", stage="vision", kind="trained", paper="arXiv:2411.03312", needs={"visual"})
@dataclass
class QueCC(LevelMethod):
    """K coarse tokens that know the question, each of which asks the tokens of its own cell for what it needs.

    The question (a map of the mean of the embedded text behind the image) is added to every normed projected token
    (n, N, D), a map of two layers follows, and a depth-wise kernel makes one query of every cell. Keys and values are
    maps of hidden states of the tower side by side, (n, N, levels * C); every query sees its own cell alone. What comes
    out (`modules.regions`) goes through one more map; all begins as the means of the cells. Cost
    O(N * (D + levels * C) * c), c <= 512 channels of attention. Outputs follow the question, so that another one needs
    other tokens.

    Source: "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters", ICLR 2025, arXiv:2411.03312
    (locuslab/llava-token-compression). There the question is the last hidden state of the language model, run on it
    alone; here it costs a mean. There a projector follows; here it stands before. Cells are s x s there, with s of
    training; ours are any K (`tensors.cells`), the kernel stretched to their sides.

    Args:
        kernel: sides of the kernel, the s of the source.

    Raises:
        ValueError: `kernel` is no integer of at least 1, `levels` are no blocks of a tower, or `positions` none of its
            values. On call: images whose tower ran elsewhere.
    """

    kernel: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("kernel", self.kernel)

    def reads(self, depth: int) -> set[Read]:
        return {QUESTION} | super().reads(depth)

    def tower_reader(self, model: nn.Module, width: int, depth: int) -> nn.Module:
        """What asks and looks things up."""
        return Asking(model.config.get_text_config().hidden_size, width, len(self.backs(depth)), self.kernel)

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        assert tokens.module is not None
        layout = cells(*tokens.grid, assignment.kept.shape[1], tokens.device)
        out: Tensor = tokens.module(tokens.embeddings, self.seen(tokens), asked(tokens), layout)
        return out


class Asking(nn.Module):
    """See `QueCC`."""

    def __init__(self, width: int, tower: int, levels: int, kernel: int):
        super().__init__()
        self.text = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.LayerNorm(width))
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(width)
        self.query = nn.Sequential(nn.Linear(width, tower), nn.GELU(), nn.Linear(tower, width), nn.LayerNorm(width))
        self.kernel, self.attention = CellKernel(width, kernel), RegionPooling(width, tower)
        self.key, self.value = looked_up(tower, levels), looked_up(tower, levels)

    def forward(self, x: Tensor, seen: Tensor, question: Tensor, layout: Cells) -> Tensor:
        """(n, N, D), (n, N, levels * C) and the question (n, D) to (n, K, D)."""
        query = self.kernel(self.query(self.norm(x) + self.text(question)[:, None]), layout)
        out: Tensor = self.mlp(self.attention(query, self.key(seen), self.value(seen), x, layout))
        return out
