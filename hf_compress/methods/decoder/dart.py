"""DART: what is least like a few pivots stays (arXiv:2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.methods.base import check_count
from hf_compress.methods.decoder.fastv import FastV
from hf_compress.methods.question import behind_images
from hf_compress.registry import register
from hf_compress.signals import Assignment, DecoderView
from hf_compress.tensors.rows import best_rows


@register("dart", stage="decoder", kind="diversity", paper="arXiv:2502.11494", needs={"visual"})
@dataclass
class DART(FastV):
    """One cut before a decoder layer: what is least like a few pivots stays; no attention is read.

    Pivots are the `visual` visual rows and the `text` rows of text behind the last image whose keys in layer
    `layer - 1` are longest (heads side by side), visual ones first, by falling norm. Each in turn takes
    q = ceil((K - visual) / (visual + text)) visual rows, of those that no one has taken the ones whose states, behind
    the final norm of the model, have the smallest cosine to its own, until K rows, visual pivots among them, stay. A
    prompt with fewer rows of text than pivots has a larger q. Budgets, plans and `layer` are those of `fastv`; with
    `scope="per_image"` every image keeps its share of the order in which rows are taken.

    The authors round q down and so keep fewer rows than asked, and walk the pivots in no stated order. They measure
    rotated keys by the L1 norm, which changes with the position at which a prompt begins: in a padded batch other rows
    would stay than alone. Here keys are measured by the L2 norm, which rotations leave as it is.

    On the built-in LLaVA (100 questions, cut before layer 1 of 6) 100 and 93 % are right with 50 and 75 % removed
    (`fastv` 98 and 96, random 94 and 74).

    Source: Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More,
    arXiv:2502.11494. Cost: O((visual + text) S D) and as many sorts of the rows; no product of rows with each other.

    Args:
        layer: the first short layer.
        visual: visual pivots.
        text: text pivots.

    Raises:
        ValueError: a knob is none of its values, or the ratio is out of reach of one cut.
    """

    visual: int = 4
    text: int = 4

    example = {"ratio": 0.4, "layer": 1, "visual": 2, "text": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("visual", self.visual)
        check_count("text", self.text, least=0)

    def decide(self, view: DecoderView, keep: list[int] | None) -> Assignment:
        assert keep is not None
        norm = view.keys(source="own").float().norm(dim=-1)
        visual = _longest(norm, view.removable, self.visual)
        text = _longest(norm, behind_images(view), self.text)
        counts = torch.tensor(keep, device=norm.device)
        turn = _turns(view.final.float(), visual, text, view.removable, counts)
        turn = turn.masked_fill(view.speaks, -1)
        stays = best_rows(-turn.float(), view.removable, keep, view.image if self.scope == "per_image" else None)
        return Assignment.selection(view.valid & ~view.removable | stays)


def _longest(norm: Tensor, among: Tensor, count: int) -> Tensor:
    """(B, count) int64 the rows of the highest `norm` (B, S) among those that are True, falling; -1 where there are no
    more. Ties go to the lower index."""
    order = norm.masked_fill(~among, float("-inf")).argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.where(among.gather(1, order), order, -1)


def _turns(x: Tensor, visual: Tensor, text: Tensor, among: Tensor, keep: Tensor) -> Tensor:
    """(B, S) int64: when each row of those that may stay is taken; the lowest numbers are taken first.

    Args:
        x: (B, S, D) states; visual: (B, v) and text: (B, t) pivots, -1: none; among: (B, S) bool rows to take;
            keep: (B,) how many are wanted.
    """
    B, S, _ = x.shape
    pivots = torch.cat([visual, text], 1)
    there, own = pivots >= 0, (visual >= 0).sum(1)
    each = -(-(keep - own).clamp(min=0) // there.sum(1).clamp(min=1))  # how many rows a pivot takes
    last = torch.iinfo(torch.int64).max
    turn = torch.full((B, S + 1), last, device=x.device)  # the last place collects pivots that are not there
    turn.scatter_(1, visual % (S + 1), torch.arange(visual.shape[1], device=x.device).expand_as(visual))
    turn = turn[:, :S]
    unit = F.normalize(x, dim=-1)
    met = visual.shape[1]
    closest = torch.full((B, S), -2.0, device=x.device)
    for pivot, real in zip(pivots.unbind(1), there.unbind(1)):
        cosine = (unit * unit.gather(1, pivot.clamp(min=0)[:, None, None].expand(-1, 1, unit.shape[-1]))).sum(-1)
        closest = torch.where(real[:, None], closest.maximum(cosine), closest)
        free = among & (turn == last)
        order = cosine.masked_fill(~free, float("inf")).argsort(dim=1, stable=True)
        place = torch.empty_like(order).scatter_(1, order, torch.arange(S, device=x.device).expand_as(order))
        takes = free & real[:, None] & (place < each[:, None])
        turn = torch.where(takes, met + place, turn)
        met += S
    rest = closest.argsort(dim=1, stable=True).argsort(dim=1)  # for shares of images: what no pivot has taken
    return torch.where(turn == last, met + rest, turn)
