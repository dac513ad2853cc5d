"""The rows of a vision tower while it runs, of which fewer go on from block to block.

A tower holds several crops, side by side in a batch or one behind the other in one row. Here all rows of all crops
are counted flat, (R, D). A crop begins with its [CLS], where there is one; then come its tokens, each of as many rows
as are joined to one token behind the tower. These rows stay and leave together, and are merged place by place.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hf_compress.engine.attention import Call
from hf_compress.signals import Assignment
from hf_compress.tensors.merge import group_sum

LAST = 2**62  # behind every index


@dataclass
class Rows:
    """Where the rows of every crop stand.

    Attributes:
        skip: rows of [CLS] before each; joined: rows of a token.
        counts: tokens of each crop, [CLS] among them.
        packed: crops follow each other; else they stand side by side, the shorter ones filled up behind.
    """

    skip: int
    joined: int
    counts: list[int]
    packed: bool

    def size(self, count: int) -> int:
        """Rows of a crop of so many tokens."""
        return self.skip + (count - self.skip) * self.joined

    @property
    def ragged(self) -> bool:
        """Whether some rows only fill up."""
        return not self.packed and len(set(self.counts)) > 1

    @property
    def starts(self) -> list[int]:
        """The first row of every crop, and the number of all rows."""
        sizes = map(self.size, self.counts) if self.packed else [self.size(max(self.counts))] * len(self.counts)
        return list(accumulate(sizes, initial=0))

    def alike(self, *marks: Sequence[Hashable]) -> list[list[int]]:
        """The crops in groups of equal counts (and equal `marks`)."""
        groups: dict[Hashable, list[int]] = {}
        for crop, mark in enumerate(zip(self.counts, *marks)):
            groups.setdefault(mark, []).append(crop)
        return list(groups.values())

    def of(self, crops: list[int], device: torch.device) -> Tensor:
        """(n, rows) int64: the rows of n crops with equal counts."""
        starts = self.starts
        first = torch.tensor([starts[i] for i in crops], device=device)
        return first[:, None] + torch.arange(self.size(self.counts[crops[0]]), device=device)

    def places(self, tokens: Tensor) -> Tensor:
        """(n, m) numbers of tokens in their crop, or -1, to those of their rows, (n, rows)."""
        if self.joined == 1:
            return tokens
        first = self.skip + (tokens[:, self.skip :, None] - self.skip) * self.joined
        rows = first + torch.arange(self.joined, device=tokens.device)
        return torch.cat([tokens[:, : self.skip], torch.where(first < 0, -1, rows).flatten(1)], 1)

    def repeat(self, x: Tensor) -> Tensor:
        """(n, m, ...) of tokens to (n, rows, ...)."""
        if self.joined == 1:
            return x
        return torch.cat([x[:, : self.skip], x[:, self.skip :].repeat_interleave(self.joined, 1)], 1)

    def mean(self, x: Tensor) -> Tensor:
        """(n, rows, ...) to (n, m, ...): the mean over the rows of a token."""
        if self.joined == 1:
            return x
        return torch.cat([x[:, : self.skip], x[:, self.skip :].unflatten(1, (-1, self.joined)).mean(2)], 1)


@dataclass
class Step:
    """How rows become fewer once.

    Attributes:
        rows: what is left.
        into: (R,) the new row that each old one goes into, -1: none.
        source: (R',) the old row that each new one stands for; of rows that only fill up any one.
        kept: the tokens that stay, (n, K) of crops with equal counts.
        weight: (R,) how much of an old row goes into its new one; None: rows stay as they are.
        added: (R', D) what is added to the new rows, None: nothing.
    """

    rows: Rows
    into: Tensor
    source: Tensor
    kept: list[tuple[list[int], Tensor]]
    weight: Tensor | None = None
    added: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """(R, D) to (R', D), differentiable."""
        if self.weight is None:
            out = x.index_select(0, self.source)
        else:
            out = Assignment(self.source[None], self.into[None], self.weight[None]).apply(x[None])[0]
        return out if self.added is None else out + self.added

    def add(self, old: Rows, crops: list[int], answer: Assignment, x: Tensor) -> None:
        """Add `x` (n, K, D) to what the outputs of `answer` have become, for crops with equal counts in `old`."""
        if answer.valid is not None:
            x = x * answer.valid[..., None]
        rows = old.of(crops, x.device).gather(1, old.places(answer.kept))
        if self.added is None:
            self.added = x.new_zeros(len(self.source), x.shape[-1])
        self.added = self.added.index_add(0, self.into[rows].clamp(min=0).flatten(), old.repeat(x).flatten(0, 1))

    def spread(self, x: Tensor) -> Tensor:
        """(R', D) back to (R, D): old rows repeat what they went into; those that vanished repeat anything."""
        return x.index_select(0, self.into.clamp(min=0))


Answer = tuple[list[int], Assignment]  # for crops with equal counts


def make_step(rows: Rows, answers: list[Answer], device: torch.device) -> Step | None:
    """One step from answers for some of the crops; the others stay as they are."""
    if not answers:
        return None
    answers = [part for answer in answers for part in _even(*answer, ordered=rows.packed)]
    told = {crop for crops, _ in answers for crop in crops}
    for crops in rows.alike([crop if crop in told else None for crop in range(len(rows.counts))]):
        if crops[0] not in told:
            every = torch.arange(rows.counts[crops[0]], device=device)
            answers.append((crops, Assignment(every.expand(len(crops), -1))))
    counts = list(rows.counts)
    for crops, answer in answers:
        for crop in crops:
            counts[crop] = answer.kept.shape[1]
    new = replace(rows, counts=counts)
    into = torch.full((rows.starts[-1],), -1, device=device)
    source = torch.zeros(new.starts[-1], dtype=torch.int64, device=device)
    weight = (
        torch.zeros(len(into), dtype=torch.float32, device=device)
        if any(answer.merges for _, answer in answers)
        else None
    )
    for crops, answer in answers:
        old, now = rows.of(crops, device), new.of(crops, device)
        groups = _groups(answer, rows.counts[crops[0]])
        place = rows.places(groups)
        into[old] = torch.where(place < 0, -1, now[:, :1] + place)
        source[now] = old.gather(1, rows.places(answer.kept))
        if weight is not None:
            weight[old] = rows.repeat(_weights(answer, groups))
    return Step(new, into, source, [(crops, answer.kept) for crops, answer in answers], weight)


def _even(crops: list[int], answer: Assignment, *, ordered: bool) -> list[Answer]:
    """The same for crops that keep equal counts each; `ordered`: their rows go on in the order in which they stood."""
    kept, groups, valid = answer.kept, answer.groups, answer.valid
    if valid is None and not ordered:
        return [(crops, answer)]
    key = kept if ordered else torch.zeros_like(kept)
    order = (key if valid is None else key.masked_fill(~valid, LAST)).argsort(dim=1, stable=True)
    kept = kept.gather(1, order)
    if groups is not None:
        groups = torch.where(groups < 0, -1, order.argsort(1).gather(1, groups.clamp(min=0)))
    counts = [kept.shape[1]] * len(crops) if valid is None else valid.sum(1).tolist()
    out: list[Answer] = []
    for count in sorted(set(counts)):
        mine = [i for i, n in enumerate(counts) if n == count]
        at = torch.tensor(mine, device=kept.device)
        into, weight = (None if x is None else x[at] for x in (groups, answer.weight))
        out.append(([crops[i] for i in mine], Assignment(kept[at, :count], into, weight)))
    return out


def _groups(answer: Assignment, tokens: int) -> Tensor:
    """(n, tokens): the output of every token, -1: none."""
    if answer.groups is not None:
        return answer.groups
    n, K = answer.kept.shape
    output = torch.arange(K, device=answer.kept.device).expand(n, K)
    return answer.kept.new_full((n, tokens), -1).scatter(1, answer.kept, output)


def _weights(answer: Assignment, groups: Tensor) -> Tensor:
    """(n, tokens) fp32: how much of every token goes into its output."""
    if answer.weight is not None:
        return answer.weight.float()
    outputs = answer.kept.shape[1] + 1  # the last one collects what vanishes
    sizes = group_sum(torch.ones_like(groups, dtype=torch.float32), groups % outputs, outputs)
    return 1 / sizes.gather(1, groups % outputs)


class Reduction:
    """The rows of one run of a tower: what is left of them, and where each original one went.

    Attributes:
        blocks: those in which the method acts, ascending.
        keeps: tokens that each crop keeps in the end, [CLS] not counted; None: the method decides.
        first: the rows as they entered; rows: as they stand now.
        into: (R,) the current row that each original one went into, -1: none; None before the first step.
        source: (R',) the original row that each current one stands for.
        sizes: (R',) fp32, original tokens in each; 0 of rows that only fill up. None: all are 1.
        memory: per crop what the method notes of its tokens.
        calls: of the attention of the block that is running.
        step: of that block, between its norm and its exit.
        passed: `into` at the entry and behind each block that has run.
    """

    def __init__(self, blocks: list[int], keeps: list[int | None], rows: Rows, device: torch.device):
        self.blocks, self.keeps, self.first, self.rows, self.device = blocks, keeps, rows, rows, device
        self.into: Tensor | None = None
        self.source: Tensor | None = None
        self.sizes: Tensor | None = None
        self.memory: list[dict[str, Tensor]] = [{} for _ in rows.counts]
        self.calls: list[Call] = []
        self.step: Step | None = None
        self.passed: list[Tensor | None] = [None]

    def take(self, step: Step) -> None:
        """Go on with the rows of a step."""
        old = self.into
        self.into = step.into if old is None else torch.where(old < 0, -1, step.into[old.clamp(min=0)])
        self.source = step.source if self.source is None else self.source[step.source]
        if self.sizes is not None or step.weight is not None or step.rows.ragged:
            fp32: Any = dict(dtype=torch.float32, device=self.device)
            sizes = torch.ones(len(step.into), **fp32) if self.sizes is None else self.sizes
            total = torch.zeros(len(step.source) + 1, **fp32)  # the last one: what vanishes
            self.sizes = total.index_add(0, step.into % len(total), sizes)[:-1]
        for crops, kept in step.kept:
            for crop, stay in zip(crops, kept):
                self.memory[crop] = {key: x[stay] for key, x in self.memory[crop].items()}
        self.rows = step.rows

    def note(self, name: str, crops: list[int], count: int, memory: dict[str, Tensor]) -> None:
        """Keep what a method wrote down for crops of `count` tokens.

        Raises:
            ValueError: it is not one row per token.
        """
        for key, x in memory.items():
            if x.shape[:2] != (len(crops), count):
                raise ValueError(
                    f"method={name!r} keeps {key!r} of shape {tuple(x.shape)} in the memory of a block; it must be (n, "
                    f"m, ...) = {(len(crops), count)}, one row per token"
                )
        for i, crop in enumerate(crops):
            self.memory[crop] = {key: x[i] for key, x in memory.items()}

    def bias(self, first: int, shape: torch.Size) -> Tensor | None:
        """(n, 1, 1, m): what is added to the logits of the keys (n, H, m, d), the first of which is row `first`."""
        if self.sizes is None:
            return None
        n, m = shape[0], shape[2]
        return self.sizes[first : first + n * m].log().view(n, 1, 1, m)

    def spread(self, x: Tensor, into: Tensor) -> Tensor:
        """Rows of the tower, (n, m, D) or (R', D), as many as entered: each repeats what it went into (`into`)."""
        return self.reshape(x.flatten(0, -2).index_select(0, into.clamp(min=0)), x)

    def reshape(self, rows: Tensor, like: Tensor) -> Tensor:
        """(R, D) in the shape in which a tower holds them."""
        return rows if like.ndim == 2 else rows.view(len(like), -1, rows.shape[-1])
