"""The vision stage: from one run of the tower to kept tokens per image, and their place in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress import budget
from hf_compress.engine.state import Forward, Stage, State
from hf_compress.patches.base import Architecture, Grid, TowerCall
from hf_compress.signals import Assignment

Decision = list[tuple[Tensor, Tensor | None]]  # per image: kept indices (K,), merged vectors (K, D)


@dataclass
class Encoded:
    """Images that one run of the tower encoded, or that the caller encoded himself.

    Attributes:
        call: what the tower left behind; None if the caller passed `mm_encoder_outputs`.
        embeddings: (N, D) per image, as the language model reads them.
        grids: (h, w) per image, None where it cannot be known.
        fixed: per image the kept tokens that were settled inside the tower or on the pixels, if they were.
        decision: kept indices and merged vectors per image, once they have been asked for.
    """

    call: TowerCall | None
    embeddings: Sequence[Tensor]
    grids: Sequence[Grid | None]
    fixed: list[Assignment] | None = None
    decision: Decision | None = None
    budgets: list[int] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        """Visual tokens per image."""
        return [len(e) for e in self.embeddings]


class ImageGroup:
    """Images of equal token count and grid, batched: the `Images` that a method sees."""

    def __init__(
        self,
        adapter: Architecture,
        model: nn.Module,
        encoded: Encoded,
        members: list[int],
        index: list[int],
        method: str,
    ):
        self._adapter, self._model, self._encoded, self._method = adapter, model, encoded, method
        self._members, self.index = members, index
        self.device = encoded.embeddings[members[0]].device
        self.has_cls = adapter.has_cls

    def __len__(self) -> int:
        return len(self._members)

    @property
    def tokens(self) -> int:
        return len(self._encoded.embeddings[self._members[0]])

    @property
    def grid(self) -> Grid:
        grid = self._encoded.grids[self._members[0]]
        if grid is None:
            raise ValueError(
                f"method={self._method!r} needs the token grid of the images, which mm_encoder_outputs alone does not "
                "tell; pass the grid argument of the model too (image_grid_thw), or pixel_values"
            )
        return grid

    @property
    def embeddings(self) -> Tensor:
        return self._stack(self._encoded.embeddings)

    @property
    def features(self) -> Tensor:
        call = self._call()
        assert call.features is not None
        grids = [g for g in self._encoded.grids if g is not None]
        return self._stack(self._adapter.split(self._model, call, call.features, grids))

    def cls(self, back: int = 0) -> Tensor:
        return self._attention(self._adapter.cls_rows, back)

    def keys(self, back: int = 0) -> Tensor:
        return self._attention(self._adapter.keys, back)

    def _attention(self, read: Any, back: int) -> Tensor:
        call = self._call()
        blocks = self._adapter.attention_blocks(self._model)
        return self._stack(read(self._model, call, blocks[-1 - back], self._encoded.grids))

    def _call(self) -> TowerCall:
        if self._encoded.call is None:
            raise ValueError(
                f"method={self._method!r} reads the vision tower, but mm_encoder_outputs was computed elsewhere; "
                "pass pixel_values, or use a method that needs the embeddings only (divprune, uniform, random)"
            )
        return self._encoded.call

    def _stack(self, per_image: Sequence[Tensor]) -> Tensor:
        return torch.stack([per_image[i] for i in self._members])


def image_budget(tokens: int, ratio: Fraction | None, keep: int | None) -> int:
    """Tokens that an image of `tokens` keeps; an image smaller than `keep` stays whole."""
    return budget.kept(tokens, ratio) if ratio is not None else min(tokens, keep or tokens)


def decide(
    stage: Stage, adapter: Architecture, model: nn.Module, encoded: Encoded, ordinals: dict[int, int]
) -> Decision:
    """Per image: kept token indices (K,) ascending, and the vectors (K, D) that replace them (None: unchanged).

    Decided once per run of the tower, in batches of equal images, without gradient; merged with gradient.

    Args:
        ordinals: the number of each image within its sample, so that a batch draws what its samples draw alone.
    """
    if encoded.decision is not None:
        return encoded.decision
    groups: dict[tuple[int, Grid | None], list[int]] = {}
    for i, (n, grid) in enumerate(zip(encoded.counts, encoded.grids)):
        groups.setdefault((n, grid), []).append(i)
    out: Decision = [None] * len(encoded.embeddings)  # type: ignore[list-item]
    encoded.budgets = [image_budget(n, stage.ratio, stage.keep) for n in encoded.counts]
    for (n, _), index in groups.items():
        k = encoded.budgets[index[0]]
        if encoded.fixed is not None:
            for i in index:
                out[i] = (encoded.fixed[i].kept[0], None)
            continue
        if k == n:
            everything = torch.arange(n, device=encoded.embeddings[index[0]].device)
            for i in index:
                out[i] = (everything, None)
            continue
        images = ImageGroup(adapter, model, encoded, index, [ordinals[i] for i in index], stage.name)
        with torch.no_grad():
            assignment = stage.method.assign(images, k)
        merged = _merge(assignment, images, adapter, model)
        for row, i in enumerate(index):
            out[i] = (assignment.kept[row], None if merged is None else merged[row])
    if not any(m is not None and m.requires_grad for _, m in out):
        encoded.decision = out  # a decision with a graph belongs to this forward alone
    return out


def _merge(assignment: Assignment, images: ImageGroup, adapter: Architecture, model: nn.Module) -> Tensor | None:
    if not assignment.merges:
        return None
    if not assignment.before_projector:
        return assignment.apply(images.embeddings)
    merged = assignment.apply(images.features)
    return torch.stack([adapter.project(model, x) for x in merged]).to(images.embeddings.dtype)


def images_per_row(visual: Tensor, counts: list[int]) -> list[list[int]] | None:
    """Which images stand in each row, images being consumed in (row, sequence) order; None if they do not fit.

    Args:
        visual: (B, L) bool; after beam expansion the rows of a sample are adjacent copies and share its images.
        counts: visual tokens per image.
    """
    per_row, have = visual.sum(1).tolist(), sum(counts)
    copies = sum(per_row) // have if have else 0
    if not copies or sum(per_row) != copies * have or len(per_row) % copies:
        return None
    rows: list[list[int]] = []
    image = 0
    for start in range(0, len(per_row), copies):
        want, mine = per_row[start], []
        while want > 0 and image < len(counts):
            want -= counts[image]
            mine.append(image)
            image += 1
        if want or any(n != per_row[start] for n in per_row[start : start + copies]):
            return None
        rows += [mine] * copies
    return rows


@dataclass
class Placement:
    """Where the decision of the vision stage falls in the prompt.

    Attributes:
        keep: (B, L) bool over the caller's rows; text rows are True.
        image: (B, L) int64, ordinal of the image in its row, -1 on text.
        merged: rows (b, l) whose embedding is replaced, and the (n, D) vectors.
        kept: per row, per image: kept token indices (K,).
        tokens: per row, per image: N.
    """

    keep: Tensor
    image: Tensor
    merged: tuple[Tensor, Tensor, Tensor] | None
    kept: list[list[Tensor]]
    tokens: list[list[int]]

    def columns(self, here: slice) -> Placement:
        """The part that falls into some columns of the prompt."""
        merged = self.merged
        if merged is not None:
            b, col, vectors = merged
            inside = (col >= here.start) & (col < here.stop)
            merged = b[inside], col[inside] - here.start, vectors[inside]
        return Placement(self.keep[:, here], self.image[:, here], merged, self.kept, self.tokens)

    @property
    def changes(self) -> bool:
        """Whether anything is cut or merged here."""
        return self.merged is not None or not bool(self.keep.all())


def place(visual: Tensor, rows: list[list[int]], decision: Decision, counts: list[int]) -> Placement:
    """The decision as a keep mask over the prompt, and merged vectors at their slots."""
    keep = torch.ones_like(visual)
    image = torch.full(visual.shape, -1, dtype=torch.int64, device=visual.device)
    at_row, at_col, vectors = [], [], []
    for b, mine in enumerate(rows):
        where = visual[b].nonzero()[:, 0]
        for ordinal, (i, span) in enumerate(zip(mine, where.split([counts[i] for i in mine]))):
            kept, merged = decision[i]
            kept = kept.to(span.device)
            keep[b, span] = False
            keep[b, span[kept]] = True
            image[b, span] = ordinal
            if merged is not None:
                at_row.append(torch.full_like(kept, b))
                at_col.append(span[kept])
                vectors.append(merged)
    merged_rows = (torch.cat(at_row), torch.cat(at_col), torch.cat(vectors)) if vectors else None
    kept_all = [[decision[i][0] for i in mine] for mine in rows]
    return Placement(keep, image, merged_rows, kept_all, [[counts[i] for i in mine] for mine in rows])


class VisualPrompt:
    """Finds the images of a forward in its prompt and takes the decision of the vision stage for them.

    Args:
        stage: the vision stage, or None where only later stages need to know which rows are visual.
        images: whether image boundaries matter to anybody (else only the visual rows are marked).
    """

    def __init__(self, model: nn.Module, adapter: Architecture, state: State, stage: Stage | None, images: bool):
        self.model, self.adapter, self.state, self.stage, self.images = model, adapter, state, stage, images
        self.ids = adapter.placeholder_ids(model.config)

    def locate(self, now: Forward, x: Tensor) -> Placement | None:
        """The placement for the rows of this forward; None where nothing in them is visual.

        Args:
            x: (B, q, D) what enters the language model, image features in place.

        Raises:
            ValueError: image features and placeholders do not match, or the method cannot read these images.
        """
        if now.ids is None or not self.ids:
            return None
        ids, start = self._whole_prompt(now)
        visual = torch.isin(ids, torch.tensor(self.ids, device=ids.device)).to(x.device)
        here = slice(start, start + x.shape[1])
        if not bool(visual[:, here].any()):
            return None
        if not self.images:
            return Placement(torch.ones_like(visual), visual.long() - 1, None, [], []).columns(here)
        encoded, rows = self._images(now, x, visual, here)
        if self.stage is None:
            whole: Decision = [(torch.arange(n, device=x.device), None) for n in encoded.counts]
            return place(visual, rows, whole, encoded.counts).columns(here)
        ordinals = {i: ordinal for mine in rows for ordinal, i in enumerate(mine)}
        decision = decide(self.stage, self.adapter, self.model, encoded, ordinals)
        return place(visual, rows, decision, encoded.counts).columns(here)

    def _whole_prompt(self, now: Forward) -> tuple[Tensor, int]:
        """Ids in which the images are counted, and where this forward starts in them."""
        assert now.ids is not None
        prompt = self.state.prompt  # set while generate() feeds a prompt in chunks
        if prompt is None:
            return now.ids, 0
        return prompt.repeat_interleave(now.ids.shape[0] // prompt.shape[0], 0), now.past

    def _images(self, now: Forward, x: Tensor, visual: Tensor, here: slice) -> tuple[Encoded, list[list[int]]]:
        """The images of the prompt, checked against the features that really stand in it."""
        encoded = self.state.encoded
        if encoded is not None and encoded.embeddings:
            rows = images_per_row(visual, encoded.counts)
            if rows is not None and _stands_in(encoded, rows, x, visual, here):
                return encoded, rows
        given = (now.inputs.get("mm_encoder_outputs") or {}).get("image")
        if given is not None:
            counts = [len(e) for e in given.pooler_output]
            rows = images_per_row(visual, counts)
            if rows is not None:
                return Encoded(
                    None, list(given.pooler_output), self.adapter.grids_of(self.model, counts, now.inputs)
                ), rows
        counts = encoded.counts if encoded is not None else []
        raise ValueError(
            f"image features and placeholders do not match: input_ids holds {visual.sum(1).tolist()} visual tokens per "
            f"row, the images give {counts}; build input_ids and pixel_values with one processor call, one image per "
            "placeholder (videos are not compressed yet)"
        )


def _stands_in(encoded: Encoded, rows: list[list[int]], x: Tensor, visual: Tensor, here: slice) -> bool:
    """Whether the embeddings at the placeholders are those that the tower gave, not another run's or the caller's."""
    for b, mine in enumerate(rows):
        first, n = int(visual[b, : here.start].sum()), int(visual[b, here].sum())
        if n:
            features = torch.cat([encoded.embeddings[i] for i in mine])[first : first + n]
            if not torch.equal(x[b, visual[b, here]], features.to(x)):
                return False
    return True
