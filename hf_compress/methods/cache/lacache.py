"""LaCache: a ladder over the layers, compacted again and again (arXiv:2507.14204)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from hf_compress.methods.base import Count, check_choice, check_count, clamp
from hf_compress.methods.pattern import Pattern
from hf_compress.registry import register
from hf_compress.signals import CacheView, Order, Rivals


class Pass(NamedTuple):
    """One way along the entries: from `start` on `full` whole groups and one of `rest` entries too many.

    A whole group has `wide` entries, of which each layer keeps every `apart`-th, `after` in all.
    """

    start: Tensor | int
    full: Tensor
    rest: Tensor
    wide: Tensor
    apart: Tensor


class Plan(NamedTuple):
    """A pass from the cursor, one from the sinks, entries that go in all, and whether a group fits at all."""

    first: Pass
    again: Pass
    gone: Tensor
    fits: Tensor


@register("lacache", stage="cache", kind="content", paper="arXiv:2507.14204")
@dataclass
class LaCache(Pattern):
    """Keep different entries in different layers: a ladder of holes that is drawn again over what is left.

    With N layers, `span` P and `overlap` O, groups of `before` = 1 + ceil((N - P) / (P - O)) consecutive entries
    give up all but `after` = ceil(P / (P - O)) of them, at most `before`, others in each layer. Groups follow one
    another from the sinks on; a cursor remembers how far they got. When only the newest N entries are left behind it,
    the ladder starts over at the sinks, where it thins what it thinned before. A prompt so long that starting over
    once is not enough is thinned by wider groups, whose members stand apart, as if the ladder had started over several
    times. All layers and heads hold as many entries.

    Groups leave whole, so that while decoding the size swings by before - after; the budget grows by half of that
    to be right on average. With the default span a group gives up one entry, and every size is exact. Where the
    budget is too small for sinks, a group and N newest entries, the newest get half of it and sinks give way.

    Differences from the release: the budget counts the newest token; the last group of a long prompt is cut short
    where the release removes up to a whole wide group more than asked; members of wide groups never leave their group
    (with overlap the release takes some entries twice). The release rotates by places in the cache: that is
    rotation="cache", not the default. Tokens fed together see what they would have seen one by one, as long as they
    are fewer than the ladder has groups. `ratio` applies to all entries; scopes and protected text are not offered.

    On the recall model (facts whose answer is two tokens) it is above random eviction when the prompt holds the
    question (68.5 % against 37.1 % at half), whose newest tokens it keeps, and below it when the question comes in a
    second turn (36.2 % against 58.8 %): a group of two leaves every layer one of any two neighbouring tokens, so that
    no layer has a whole answer, where random eviction leaves some head both. It keeps the thread of a long text, which
    is what the paper measures, rather than single facts.

    Source: "LaCache: Ladder-Shaped KV Caching for Efficient Long-Context Modeling of Large Language Models", ICML 2025,
    arXiv:2507.14204. Cost: one gather; at a step, with a span that gives up one entry of a group, the next token is
    written over it.

    Args:
        span: layers that hold an entry of the ladder; half of them (rounded up) by default, 16 of 32 in the paper.
        overlap: layers that neighbouring entries share, less than `span`.
        pattern: "interleaved" gives layer i the members at i mod (before - after + 1), as released; "ladder" gives
            neighbouring layers the same ones, as drawn (which end of the ladder is earliest is not established: here
            the first layers hold the oldest).
    """

    span: int | None = None
    overlap: int = 0
    pattern: str = "interleaved"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("overlap", self.overlap, least=0)
        check_choice("pattern", self.pattern, ("interleaved", "ladder"))
        if self.span is not None:
            check_count("span", self.span, least=self.overlap + 1)

    def check(self, layers: int, ratio: Fraction | None) -> None:
        super().check(layers, ratio)
        self._group(layers)

    def groups(self, layers: list[int]) -> list[list[int]]:
        self._group(len(layers))  # sliding layers are none of the ladder: there may be too few others
        return super().groups(layers)

    @property
    def stepwise(self) -> bool:
        """Rows fed together see what they would have seen one by one only while the ladder has groups for all."""
        return True

    def _group(self, layers: int) -> tuple[int, int]:
        """(before, after): entries of a group, and those that a layer keeps."""
        span = -(-layers // 2) if self.span is None else self.span
        step = span - self.overlap
        if step < 1 or span >= layers:
            raise ValueError(
                f"span={span}, overlap={self.overlap}: a ladder over {layers} layers needs overlap < span < {layers}"
            )
        before = 1 - (span - layers) // step
        after = min(-(-span // step), before)
        if after == before:
            raise ValueError(f"span={span}, overlap={self.overlap}: over {layers} layers no entry of a group would go")
        return before, after

    def _parts(self, budget: Count, depths: int) -> tuple[Count, Count, Count]:
        """Sinks, newest entries, and groups between them of what they leave behind."""
        after = self._group(depths)[1]
        newest = clamp(budget // 2, 1, depths)
        sinks = clamp(budget - newest - after, 0, self.sinks)
        return sinks, newest, (budget - newest - sinks) // after

    def _plan(self, view: Order) -> Plan:
        before, after = self._group(view.depths)
        cut = before - after
        budget = view.budget + cut // 2
        sinks, newest, size = self._parts(budget, view.depths)
        excess = (view.lengths + view.incoming - budget).clamp(min=0)
        gone = torch.where(budget > 2 * cut, _ceil(excess, cut) * cut, excess)
        start = sinks if view.cursor is None else view.cursor
        here = torch.minimum(gone, (budget - newest - start) // after * cut)
        over = gone - here
        apart = _ceil(over, (size * cut).clamp(min=1)).clamp(min=1)
        wide = apart * (before - 1) + 1
        one = torch.ones_like(gone)
        first = Pass(start, here // cut, here % cut, one * before, one)
        again = Pass(sinks, over // (wide - after), over % (wide - after), wide, apart)
        return Plan(first, again, gone, size > 0)

    def fit(self, view: CacheView, room: Tensor, have: Tensor) -> Tensor:
        return have - self._plan(view).gone.amax((1, 2)).to(have.device)

    def rivals(self, budget: int, cursor: int | None, depth: int, depths: int) -> Rivals | None:
        before, after = self._group(depths)
        if before - after > 1:
            return None  # the size swings
        sinks, newest, groups = self._parts(budget, depths)
        if groups < 1:
            return Rivals(0, cursor=cursor)
        start = sinks if cursor is None or cursor + after > budget - newest else cursor
        last = self._offset(depth, depths, 2) == 0  # of a group the first or the last one goes
        return Rivals(start + after * last, cursor=start + after)

    def cursor(self, view: CacheView) -> Tensor:
        after, plan = self._group(view.depths)[1], self._plan(view)
        first, again = (p.start + (p.full + (p.rest > 0)) * after for p in (plan.first, plan.again))
        return torch.where(plan.again.full + plan.again.rest > 0, again, first)

    def keeps(self, view: Order) -> Tensor:
        plan = self._plan(view)
        stays = self._holes(view, view.order, plan.first)
        left = (stays & view.valid).long().cumsum(-1) - 1
        stays = stays & self._holes(view, left, plan.again)
        return torch.where(plan.fits, stays, view.order >= plan.gone)

    def _holes(self, view: Order, rank: Tensor, p: Pass) -> Tensor:
        """What one pass leaves of entries with these ranks: bool, of the shape of `rank`."""
        after = self._group(view.depths)[1]
        place = rank - p.start
        member = place % p.wide - self._offset(view.depth, view.depths, p.wide - p.apart * (after - 1))
        whole = (member >= 0) & (member % p.apart == 0) & (member < p.apart * after)
        beyond = place - p.full * p.wide
        member = beyond - self._offset(view.depth, view.depths, p.rest + 1)
        last = (member >= 0) & (member < after) | (beyond >= after + p.rest) | (p.rest == 0)
        return (place < 0) | torch.where(beyond < 0, whole, last)

    def _offset(self, depth: int, depths: int, choices: Count) -> Count:
        """Where in a group the first member of a layer stands, of so many places."""
        return depth % choices if self.pattern == "interleaved" else depth * choices // depths


def _ceil(a: Tensor, b: Tensor | int) -> Tensor:
    return -(-a // b)
