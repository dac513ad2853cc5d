"""Which images stand where in a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_compress.engine.encoded import Crop


@dataclass
class Book:
    """Which images stand where in a whole prompt, for reports.

    Attributes:
        keep, image: as in `Placement`, over the whole prompt.
        tokens: per row, per image: number of visual tokens, newlines excluded.
        spans: per modality the (B, L) placeholders and, per row, the placeholders of each image.
        earlier: per row, images of earlier turns.
        start: the caller's row behind the first column.
        crops: per row, per image.
        sample: per row, per image: which of the samples packed into the row shows it.
        owner: as in `Placement`, over the whole prompt; None: nothing was merged.
    """

    keep: Tensor
    image: Tensor
    tokens: list[list[int]]
    spans: list[tuple[Tensor, list[list[int]]]]
    earlier: list[int]
    start: int
    crops: list[list[list[Crop]]]
    sample: list[list[int]]
    owner: Tensor | None = None

    def rows(self) -> list[list[Tensor]]:
        """Per row, per image: the caller's rows that stand for it."""
        out: list[list[Tensor]] = [[] for _ in self.tokens]
        for visual, per_row in self.spans:
            for b, lengths in enumerate(per_row):
                out[b] += (visual[b].nonzero()[:, 0] + self.start).split(lengths)
        return out

    def left(self) -> list[list[int]]:
        """Per row, per image: visual tokens that stay, newlines excluded."""
        alive = self.image.masked_fill(~self.keep, -1)
        rows = zip(alive, self.tokens, self.earlier)
        return [[int((row == n + i).sum()) for i in range(len(mine))] for row, mine, n in rows]

    def kept(self) -> list[list[Tensor]]:
        """Per row, per image: indices into the rows of the image that stay, newlines included."""
        out: list[list[Tensor]] = [[] for _ in self.tokens]
        for visual, per_row in self.spans:
            for b, lengths in enumerate(per_row):
                stays = self.keep[b, visual[b]]
                out[b] += [part.nonzero()[:, 0] for part in stays.split(lengths)]
        return out

    def owners(self) -> list[list[Tensor]]:
        """Per row, per image: of each of its rows which of them it went into, itself where it stays, -1 where gone.

        Of methods that merge by one matrix for all (`Assignment.dense`) those that stay, alone.
        """
        columns = torch.ones_like(self.keep, dtype=torch.long).cumsum(1) - 1
        group = columns if self.owner is None else self.owner  # by one of its members, which need not be the one kept
        stands = self.keep & (group >= 0)
        row, kept = stands.nonzero().unbind(1)
        slot = torch.full_like(columns, -1).index_put((row, group[stands]), kept)
        owner = slot.gather(1, group.clamp(min=0)).masked_fill(group < 0, -1)
        out: list[list[Tensor]] = [[] for _ in self.tokens]
        for visual, per_row in self.spans:
            place = visual.long().cumsum(1) - 1
            for b, lengths in enumerate(per_row):
                mine, start = owner[b, visual[b]], 0
                for part in mine.split(lengths):
                    within = place[b].take(part.clamp(min=0)) - start
                    out[b].append(within.masked_fill(part < 0, -1))
                    start += len(part)
        return out


@dataclass
class Placement:
    """Images in the rows of a forward.

    Attributes:
        keep: (B, q) bool; text rows are True.
        image: (B, q) int64, ordinal of the image (then of the video) in its row, -1 on text and on newline rows.
        merged: rows (b, l) whose embedding is replaced, and the (n, D) vectors.
        told: rows (b, l) of text, and the (n, D) vectors of which the mean of each row is added to it.
        book: the images of the whole prompt; None where nobody asked for their boundaries.
        owner: (B, q) int64, of every row the column of the one that it was merged into, itself where it stays, -1 where
            it is gone.
        noted: (B, q) by name, what the vision method tells of every visual row (`VisionMethod.note`), 0 on text.
        number: (B, q) int64, of methods whose other tokens pass: of every visual row the number of its sequence, from 1
            on; 0 on text. `keep` is then True on all rows, that of the book where they last.
    """

    keep: Tensor
    image: Tensor
    merged: tuple[Tensor, Tensor, Tensor] | None = None
    book: Book | None = None
    owner: Tensor | None = None
    noted: dict[str, Tensor] = field(default_factory=dict)
    told: tuple[Tensor, Tensor, Tensor] | None = None
    number: Tensor | None = None

    def columns(self, here: slice) -> Placement:
        """The part that falls into some columns of the prompt."""
        if here.start == 0 and here.stop == self.keep.shape[1]:
            return self
        merged, told = (_inside(rows, here) for rows in (self.merged, self.told))
        owner = None if self.owner is None else (self.owner[:, here] - here.start).clamp(min=-1)
        noted = {name: values[:, here] for name, values in self.noted.items()}
        keep, image = self.keep[:, here], self.image[:, here]
        return replace(self, keep=keep, image=image, merged=merged, owner=owner, noted=noted, told=told)

    def fill(self, x: Tensor) -> None:
        """Write into the embeddings (B, q, D), in place, what stands for several of them or is told to them."""
        if self.merged is not None:
            b, col, vectors = self.merged
            x.index_put_((b, col), vectors.to(x))
        if self.told is not None:
            b, col, vectors = self.told
            one = torch.ones((), dtype=torch.float32, device=b.device)
            count = one.new_zeros(x.shape[:2]).index_put((b, col), one, accumulate=True)
            x.index_put_((b, col), (vectors / count[b, col, None]).to(x), accumulate=True)

    @property
    def changes(self) -> bool:
        """Whether anything is cut, merged or told."""
        return self.merged is not None or self.told is not None or not bool(self.keep.all())


Rows = tuple[Tensor, Tensor, Tensor]


def _inside(rows: Rows | None, here: slice) -> Rows | None:
    """Rows (b, l) and their vectors that fall into some columns, counted from the first of these."""
    if rows is None:
        return None
    b, col, vectors = rows
    inside = (col >= here.start) & (col < here.stop)
    return b[inside], col[inside] - here.start, vectors[inside]
