"""VMTC: primary tokens stay, the others are clustered; text is kept from looking at what does not concern it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from hf_compress.budget import check_share
from hf_compress.methods.base import CacheMethod, Part, VisionMethod, check_count
from hf_compress.methods.reader import Reader
from hf_compress.registry import register
from hf_compress.signals import Assignment, Read, Reading, Slots, Tokens
from hf_compress.tensors.attention import at_once, rows_attention
from hf_compress.tensors.cluster import kmeans
from hf_compress.tensors.merge import by_first, group_sum
from hf_compress.tensors.rows import compact

__all__ = ["VMTC"]


@register("vmtc", stage="vision", kind="merging", paper="arXiv:2411.15453", needs={"visual", "cls"})
@dataclass
class VMTC(VisionMethod):
    """Tokens of high attention stay, the others are clustered, and each cluster becomes one token.

    1. The round(K * primary) tokens of the highest head-mean [CLS] attention stay as they are. 2. The others are
    clustered by the cosine of the features (n, N, D) that the projector reads: k-means whose centres start at evenly
    spaced ones of them, `steps` times (see `kmeans`; no cluster is left empty). 3. A cluster is the mean of its tokens
    weighted with their attention, at the place of its first one. Features are merged before the projector. Every crop
    and frame by itself. Cost O(steps * N * K * D).

    Source: "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy",
    arXiv:2411.15453, of which no code is known. Published is that primary tokens stay and redundant ones are clustered
    and merged; the share of both, the start and the number of steps are our choice. Encoders without [CLS] take the
    attention received.

    Its second part, cross-modal attention inhibition, is off unless `hide` is above 0: see `Inhibition`. It acts in the
    cache stage, where no other method can be then, and stores everything as it is.

    Args:
        primary: share of the K tokens that stay as they are.
        steps: of k-means.
        hide: share of the image tokens that it sees which is hidden from each row of text.
        hide_after: the layer whose attention says which; they are hidden in all later ones.

    Raises:
        ValueError: `primary` or `hide` is not a number in [0, 1), `steps` is not an integer of at least 1, `hide_after`
            none of at least 0.
    """

    primary: float = 0.75
    steps: int = 10
    hide: float = 0.0
    hide_after: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.primary, "primary")
        check_count("steps", self.steps)
        check_share(self.hide, "hide")
        check_count("hide_after", self.hide_after, least=0)

    def parts(self, layers: int, tokens: int | None, ratio: Fraction | None, keep: int | None) -> Mapping[str, Part]:
        """The clusters, and what hides them."""
        if not self.hide or ratio == 0:
            return {}
        if self.hide_after >= layers - 1:
            raise ValueError(f"hide_after={self.hide_after}: no later layer follows in a decoder of {layers}")
        inhibition = Inhibition(hide=self.hide, after=self.hide_after)
        return {"vision": (self, ratio, keep), "cache": (inhibition, None, None)}

    def reads(self, depth: int) -> set[Read]:
        return {Read("tower", 0, "attention")}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups and weights (n, N), kept (n, K): primary tokens and the first ones of the clusters, ascending."""
        score = tokens.attention(surrogate="all").mean(1)
        stay = min(round(keep * check_share(self.primary, "primary")), keep - 1)
        primary, rest = score.argsort(dim=1, descending=True, stable=True).split([stay, tokens.count - stay], dim=1)
        rest, clusters = rest.sort(dim=1).values, keep - stay
        first = torch.arange(clusters, device=rest.device).mul(rest.shape[1]) // clusters
        x = Assignment(rest).pick(tokens.features)
        numbers = torch.arange(clusters, keep, device=rest.device).expand_as(primary)
        groups = torch.empty_like(score, dtype=torch.int64).scatter_(1, primary, numbers)
        groups, kept = by_first(groups.scatter_(1, rest, kmeans(x, first.expand(len(x), -1), self.steps)), keep)
        weight = score.clamp(min=torch.finfo(score.dtype).tiny)
        weight = weight / group_sum(weight, groups, keep).gather(1, groups)
        return Assignment(kept, groups, weight, before_projector=True)


@dataclass
class Inhibition(CacheMethod, Reader):
    """Hides from every row of text the image tokens that neither it nor the text before it looks at.

    With A the attention of layer `after` (mean over heads), the focus of a row t of text on a token i is the sum over
    the rows s of text, t itself among them, of A[t, s] A[s, i]. Of the n image tokens that t sees the floor(n * hide)
    of least focus are hidden from it in all later layers; of equal ones the first. Rows of the image see everything.
    Generated rows are rows of text: what earlier rows looked at is remembered, N numbers per entry. Cost: the attention
    rows of all text in one layer, T S H d, in blocks; and a mask of rows times entries in the later layers.

    The embedded LLaVA answers 100, 99 and 84 of 100 questions with 50, 89 and 94 % removed, as many with a tenth hidden
    (two of 22 tokens), and 100, 95 and 81 with half of them hidden.
    """

    hide: float = 0.1
    after: int = 1

    def reader(self) -> Reader:
        return self

    def choose(self, reading: Reading) -> Tensor | None:
        """(B, 1, q, S) bool, in the layers behind the one that decides."""
        if reading.layer < self.after:
            return None
        rows, entries, known = reading.rows, reading.entries, reading.memory
        if "hidden" not in known:
            known["hidden"] = hidden_from_text(reading, check_share(self.hide, "hide"))
            known["of row"], known["of entry"] = rows.index, entries.index
            return None
        hidden = known["hidden"]
        row, entry = places(known["of row"], rows), places(known["of entry"], entries)
        hidden = hidden.gather(1, row[..., None].expand(-1, -1, hidden.shape[2]))
        return ~hidden.gather(2, entry[:, None].expand(-1, hidden.shape[1], -1))[:, None]


def places(index: Tensor, slots: Slots) -> Tensor:
    """(B, S): where in `index` (B, S') the rows behind some `slots` stand: other layers may hold fewer."""
    most = int(torch.maximum(index.max(), slots.index.max())) + 1
    at = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return index.new_zeros(len(index), most).scatter_(1, index, at).gather(1, slots.index)


def hidden_from_text(reading: Reading, share: Fraction) -> Tensor:
    """(B, q, S) bool: the entries of least focus, see `Inhibition`."""
    rows, entries = reading.rows, reading.entries
    (B, q), S = rows.index.shape, entries.index.shape[1]
    text = entries.valid & (entries.image < 0)
    cols, shown = numbered(entries.valid & (entries.image >= 0))
    looks = cols.new_zeros(B, cols.shape[1], S, dtype=torch.float32)  # of every row of text, at the images
    if (before := reading.side.get("looks")) is not None:
        looks[:, : before.shape[1]] = before
    speaking, real = compact(rows.valid & (rows.image < 0))
    out = torch.zeros(B, q, S + 1, dtype=torch.bool, device=cols.device)
    size = at_once(cols.device, B * reading.queries.shape[1] * S)
    for some, ok in zip(speaking.split(size, 1), real.split(size, 1)):
        n = some.shape[1]
        see = reading.visible.expand(B, -1, -1, -1)
        see = see.gather(2, some[:, None, :, None].expand(-1, see.shape[1], -1, S))
        at = some[:, None, :, None].expand(-1, reading.queries.shape[1], -1, reading.queries.shape[3])
        shares = rows_attention(reading.queries.gather(2, at), reading.keys, reading.scaling, see).mean(1)
        where = cols.clamp(max=S - 1)[:, None].expand(-1, n, -1)
        given = shares.gather(2, where) * (shown[:, None] & ok[..., None])
        looks.scatter_(2, (S - q + some)[:, None].expand(-1, looks.shape[1], -1), given.mT)
        focus = (shares * text[:, None]) @ looks.mT
        seen = see.any(1).gather(2, where) & shown[:, None] & ok[..., None]
        most = seen.sum(2, keepdim=True) * share.numerator // share.denominator
        least = focus.masked_fill(~seen, torch.inf).argsort(dim=2, stable=True).argsort(dim=2) < most
        gone = out.new_zeros(B, n, S + 1).scatter_(2, cols[:, None].expand(-1, n, -1), least)
        out.scatter_(1, some[..., None].expand(-1, -1, S + 1), gone)
    reading.side["looks"] = looks
    return out[..., :S]


def numbered(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N): where the True slots of `mask` (B, S) stand, in order, and S behind the last; which are real."""
    B, S = mask.shape
    number = mask.long().cumsum(1) - 1
    most = max(1, int(mask.sum(1).max()))
    slots = torch.arange(S, device=mask.device).expand_as(mask)
    out = slots.new_full((B, most + 1), S)
    out = out.scatter_(1, number.masked_fill(~mask, most), slots)[:, :most]
    return out, torch.arange(most, device=mask.device) < mask.sum(1, keepdim=True)
