"""FIT: groups of tokens with a few latent ones each, layer by layer; the latents go to the language model."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.methods.base import check_count
from hf_compress.methods.cells import CellMethod
from hf_compress.modules.attention import Attention, Mlp
from hf_compress.modules.positions import middles, sincos
from hf_compress.registry import register
from hf_compress.tensors.cells import Cells, lists, means

__all__ = ["FIT"]


@register("fit", stage="vision", kind="trained", paper="arXiv:2305.12689", needs={"visual"})
@dataclass
class FIT(CellMethod):
    """K latent tokens, a few for every group of tokens, that read their group and talk to all other latents.

    A latent begins as the mean of its cell of projected tokens (n, N, D). `latents` cells that follow each other, and
    their tokens, are a group. Block by block of `schedule`, "(a)b(a)b": a layers of attention and a map inside each
    group, over its tokens; its latents read its tokens; b such layers over all latents; and unless it was the last
    block, the tokens read the latents of their group. Places are added where things attend (`modules.positions`). All
    begins without effect. Cost O(layers * (N * D * C + N * S * C)) for groups of S tokens and C <= 512 channels of
    attention, and O(layers * K^2 * C): no layer sees all N tokens at once.

    Source: "FIT: Far-reaching Interleaved Transformers", arXiv:2305.12689 (google-research/pix2seq). There it is a
    model of its own, trained from nothing, whose output is tokens and latents; latents begin as trained vectors. Here
    it stands behind a tower and a projector, and what is kept are its latents, so that minutes suffice; groups follow
    from K.

    Args:
        schedule: how many layers each block has, "(local)global" one after the other.
        latents: of a group.

    Raises:
        ValueError: `schedule` is not of that form, or its last block has no global layer; `latents` is no
            integer of at least 1, or `positions` none of its values.
    """

    schedule: str = "(1)1(1)1"
    latents: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("latents", self.latents)
        blocks(self.schedule)

    def module(self, model: nn.Module) -> nn.Module:
        """All layers."""
        return Interleaved(model.config.get_text_config().hidden_size, blocks(self.schedule), self.latents)


class Interleaved(nn.Module):
    """See `FIT`."""

    def __init__(self, width: int, schedule: list[tuple[int, int]], latents: int):
        super().__init__()
        self.latents, last = latents, len(schedule) - 1
        self.blocks = nn.ModuleList(Block(width, *both, i < last) for i, both in enumerate(schedule))

    def forward(self, x: Tensor, layout: Cells) -> Tensor:
        """(n, N, D) to (n, K, D)."""
        n, place = len(x), sincos(middles(layout.grid, x.device), x.shape[-1]).to(x.dtype)
        group = torch.arange(len(layout.centres), device=x.device) // self.latents
        at, real = lists(group[layout.groups])  # (groups, S) tokens of each
        own, here = lists(group)  # (groups, latents)
        few, many = means(x, layout), x[:, at].flatten(0, 1)
        at_few, at_many = place[layout.centres], place[at].repeat(n, 1, 1)
        real, seen = real.repeat(n, 1), here.repeat(n, 1)
        for block in self.blocks:
            for layer in block.local:
                many = layer(many, at_many, real)
            told = block.read(few[:, own].flatten(0, 1), many, at_few[own].repeat(n, 1, 1), seen=real)
            few = told.unflatten(0, (n, -1))[:, here]
            for layer in block.whole:
                few = layer(few, at_few)
            if block.back is not None:
                many = block.back(many, few[:, own].flatten(0, 1), at_many, seen=seen)
        return few


class Block(nn.Module):
    """Layers inside of groups, latents that read, layers over all latents, and tokens that read."""

    def __init__(self, width: int, local: int, whole: int, goes_on: bool):
        super().__init__()
        self.local, self.read = nn.ModuleList(Layer(width) for _ in range(local)), Attention(width)
        self.whole = nn.ModuleList(Layer(width) for _ in range(whole))
        self.back = Attention(width) if goes_on else None


class Layer(nn.Module):
    """Attention of tokens to each other, and a map."""

    def __init__(self, width: int):
        super().__init__()
        self.attention, self.mlp = Attention(width), Mlp(width)

    def forward(self, x: Tensor, place: Tensor, seen: Tensor | None = None) -> Tensor:
        """(n, N, D) to the same; `seen` as of `Attention`."""
        out: Tensor = self.mlp(self.attention(x, place=place, seen=seen))
        return out


def blocks(schedule: str) -> list[tuple[int, int]]:
    """[(local, global)] layers of blocks such as "(2)4(2)1".

    Raises:
        ValueError: it is not of that form, or nothing reads its last local layers.
    """
    fits = isinstance(schedule, str) and re.fullmatch(r"(\(\d+\)\d*)+", schedule)
    found = [(int(a), int(b or 0)) for a, b in re.findall(r"\((\d+)\)(\d*)", schedule)] if fits else []
    if not found or not found[-1][1]:
        raise ValueError(
            f"schedule={schedule!r} must be blocks of (local)global layers, the last one with a global layer, as in "
            "'(1)1(1)1'"
        )
    return found
