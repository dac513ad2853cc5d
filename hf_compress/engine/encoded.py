"""Images that a model has encoded, and what was decided for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hf_compress.patches.base import Grid, TowerCall, Unit


@dataclass
class Choice:
    """The decision for sequences of one shape.

    Attributes:
        units: the first unit of each of n sequences of units, which follow each other in the prompt.
        kept: (n, K) token indices; `valid` (n, K) bool, False on those that only fill up, None: all are real.
        mixed: (n, K) bool, kept tokens that others went into; None: a selection.
        vectors: (m, D) what these become, those of all units in a row.
        noted: (n, N) by name, what the method tells of every token.
        owners: (n, N) int64, of every token the kept one that it went into, -1 where it is gone; None: a selection.
        told: (n, T, D) what the text behind is told, see `VisionMethod.make`; None: nothing.
    """

    units: list[int]
    kept: Tensor
    mixed: Tensor | None = None
    vectors: Tensor | None = None
    valid: Tensor | None = None
    owners: Tensor | None = None
    noted: dict[str, Tensor] = field(default_factory=dict)
    told: Tensor | None = None


class Question:
    """The text behind each image of a call; two are equal if they say the same behind all of them.

    Attributes:
        ids: (images, T) token ids, padded at the left; real: (images, T) bool.
        row: (images,) int64, in which row of the batch it stands, the last one of copies; at: (images, T) its columns.
    """

    def __init__(self, ids: Tensor, real: Tensor, row: Tensor, at: Tensor):
        self.ids, self.real, self.row, self.at = ids.masked_fill(~real, 0), real, row, at

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Question) or self.ids.shape != other.ids.shape:
            return False
        return torch.equal(self.ids, other.ids) and torch.equal(self.real, other.real)

    __hash__ = None  # type: ignore[assignment]


@dataclass
class Setting:
    """What a prompt tells of the images that stand in it.

    Attributes:
        ordinals: the number of each image in its sample, so that a batch draws what its samples draw alone.
        samples: the sample of each image.
        question: None where nobody reads it.
        losses: takes what the method adds to the loss of the forward.
        looks: a `looks.Looks`: what rows of the prompt look at in layers of the language model; None: nobody asks.
    """

    ordinals: dict[int, int]
    samples: dict[int, tuple[int, int]]
    question: Question | None = None
    losses: list[Tensor] = field(default_factory=list)
    looks: Any = None


@dataclass
class Crop:
    """What a picture of a crop needs to know when its prompt has been read.

    Attributes:
        grid, rows, source: as in `Unit`.
        crop: its number among the crops of its image, `crops` of which it lies over.
        sample: of its pixels, see `TowerCall`; None if the tower did not run here.
    """

    grid: Grid | None
    rows: Tensor
    source: Tensor | None
    crop: int
    crops: int
    sample: tuple[Tensor, int] | None


@dataclass
class Encoded:
    """Images (or videos) that the model encoded, or that the caller encoded himself.

    Attributes:
        call: what tower and projector left behind; None if the caller passed `mm_encoder_outputs`.
        images: (rows, D) per image, as the language model reads them.
        units: their crops, in the order of the images.
        source: the `pooler_output` that held them.
        modality: "image" or "video".
        decision: kept tokens and merged vectors of all units, once they have been asked for.
        asked: the question that it was taken for.
        content: (images,) int64, likewise; see `content.of_images`.
    """

    call: TowerCall | None
    images: Sequence[Tensor]
    units: Sequence[Unit]
    source: Any = None
    modality: str = "image"
    decision: list[Choice] | None = None
    asked: Question | None = None
    content: Tensor | None = None
    _joined: Encoded | None = None

    def joined(self, counts: list[int]) -> Encoded:
        """The same with every `counts[i]` images that follow each other as the crops of one."""
        if len(counts) == len(self.images):
            return self
        if self._joined is None or len(self._joined.images) != len(counts):
            picture = [i for i, n in enumerate(counts) for _ in range(n)]
            before = [at - start for at, start in zip(accumulate(self.rows, initial=0), self._starts(counts))]
            alone = [counts[i] == 1 for i in picture]
            units = [
                replace(u, image=picture[u.image], rows=u.rows + before[u.image], box=u.box if alone[u.image] else None)
                for u in self.units
            ]
            parts = iter(self.images)
            images = [torch.cat([next(parts) for _ in range(n)]) for n in counts]
            self._joined = Encoded(self.call, images, units, self.source, self.modality)
        return self._joined

    def _starts(self, counts: list[int]) -> list[int]:
        """Per image: rows of all images before the first that it is joined to."""
        rows = iter(self.rows)
        sizes = [sum(next(rows) for _ in range(n)) for n in counts]
        return [start for start, n in zip(accumulate(sizes, initial=0), counts) for _ in range(n)]

    @functools.cached_property
    def rows(self) -> list[int]:
        """Placeholders per image."""
        return [len(x) for x in self.images]

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Tokens per unit."""
        return [len(unit.rows) for unit in self.units]

    def tokens(self) -> list[int]:
        """Visual tokens per image: rows that belong to a crop."""
        out = [0] * len(self.images)
        for unit, size in zip(self.units, self.sizes):
            out[unit.image] += size
        return out

    def crops(self) -> list[list[Crop]]:
        """Per image what is remembered of its units."""
        out: list[list[Crop]] = [[] for _ in self.images]
        first: dict[int, int] = {}
        given, all_ = (None, 0) if self.call is None or self.call.sample is None else self.call.sample
        patches = len(given) // max(1, sum(self.sizes)) if given is not None else 1
        for unit, size, start in zip(self.units, self.sizes, accumulate(self.sizes, initial=0)):
            mine = None if given is None else given[unit.crop : unit.crop + 1]
            if given is not None and given.ndim == 1:
                mine = given[start * patches : (start + size) * patches]
            number = unit.crop - first.setdefault(unit.image, unit.crop)
            out[unit.image].append(
                Crop(unit.grid, unit.rows, unit.source, number, unit.crops, None if mine is None else (mine, all_))
            )
        return out
