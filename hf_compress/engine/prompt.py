"""Where the images of a forward stand in its prompt, and where the decision of the vision stage falls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_compress.engine.state import Forward, Stage, State
from hf_compress.engine.vision import Decision, Encoded, decide
from hf_compress.patches.base import Architecture


@dataclass
class Placement:
    """Images in the rows of a prompt.

    Attributes:
        keep: (B, L) bool over the caller's rows; text rows are True.
        image: (B, L) int64, ordinal of the image (then of the video) in its row, -1 on text and on newline rows.
        merged: rows (b, l) whose embedding is replaced, and the (n, D) vectors.
        kept: per row, per image: indices into the rows of the image that stay, newlines included.
        tokens: per row, per image: number of visual tokens, newlines excluded.
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
        return replace(self, keep=self.keep[:, here], image=self.image[:, here], merged=merged)

    @property
    def changes(self) -> bool:
        """Whether anything is cut or merged."""
        return self.merged is not None or not bool(self.keep.all())


class VisualPrompt:
    """Finds the images of a forward in its prompt and takes the decision of the vision stage for them.

    Args:
        stage: the vision stage, or None where only later stages need to know which rows are visual.
        images: whether image boundaries matter to anybody (else only the visual rows are marked).
    """

    def __init__(self, model: nn.Module, adapter: Architecture, state: State, stage: Stage | None, images: bool):
        self.model, self.adapter, self.state, self.stage, self.images = model, adapter, state, stage, images
        self.ids = adapter.placeholders(model.config)

    def visual(self, ids: Tensor) -> Tensor:
        """(B, L) bool: the placeholders in `ids`."""
        return functools.reduce(torch.logical_or, [ids == token for token in self.ids.values()])

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
        ids, here = ids.to(x.device), slice(start, start + x.shape[1])
        visual = self.visual(ids)
        if not bool(visual[:, here].any()):
            return None
        if not self.images:
            return Placement(torch.ones_like(visual), visual.long() - 1, None, [], []).columns(here)
        B = ids.shape[0]
        whole = Placement(torch.ones_like(visual), visual.new_full(visual.shape, -1, dtype=torch.int64), None, [], [])
        whole.kept, whole.tokens = [[] for _ in range(B)], [[] for _ in range(B)]
        for modality, token in self.ids.items():
            mine = ids == token
            if bool(mine.any()):
                encoded, rows = self._images(now, modality, x, mine, here)
                self._place(whole, mine, encoded, rows)
        return whole.columns(here)

    def _whole_prompt(self, now: Forward) -> tuple[Tensor, int]:
        """Ids in which the images are counted, and where this forward starts in them."""
        assert now.ids is not None
        prompt = self.state.prompt  # set while generate() feeds a prompt in chunks
        if prompt is None:
            return now.ids, 0
        return prompt.repeat_interleave(now.ids.shape[0] // prompt.shape[0], 0), now.past

    def _images(
        self, now: Forward, modality: str, x: Tensor, visual: Tensor, here: slice
    ) -> tuple[Encoded, list[list[int]]]:
        """The images of the prompt, checked against the features that really stand in it."""
        encoded = self.state.encoded.get(modality)
        if encoded is not None:
            rows = images_per_row(visual, encoded.rows)
            if rows is not None and _stands_in(encoded, rows, x, visual, here):
                return encoded, rows
        given = (now.inputs.get("mm_encoder_outputs") or {}).get(modality)
        if given is not None:
            images = self.adapter.images(self.model, modality, given, now.inputs)
            rows = images_per_row(visual, [len(i) for i in images])
            if rows is not None:
                return Encoded(None, images, self.adapter.units(self.model, modality, images, now.inputs)), rows
        have = encoded.rows if encoded is not None else []
        raise ValueError(
            f"{modality} features and placeholders do not match: input_ids holds {visual.sum(1).tolist()} {modality} "
            f"tokens per row, the {modality}s give {have}; build input_ids and pixel values with one processor call, "
            f"one {modality} per placeholder"
        )

    def _place(self, whole: Placement, visual: Tensor, encoded: Encoded, rows: list[list[int]]) -> None:
        """Add the images of one modality to a placement."""
        decision: Decision | None = None
        if self.stage is not None:
            ordinals = {i: ordinal for mine in rows for ordinal, i in enumerate(mine)}
            decision = decide(self.stage, self.adapter, self.model, encoded, ordinals)
        at_row, at_col, vectors = [], [], []
        tokens = encoded.tokens()
        for b, mine in enumerate(rows):
            where = visual[b].nonzero()[:, 0]
            for i, span in zip(mine, where.split([encoded.rows[i] for i in mine])):
                ordinal = len(whole.tokens[b])
                for u, unit in enumerate(encoded.units):
                    if unit.image != i:
                        continue
                    at = span[unit.rows.to(span.device)]
                    whole.image[b, at] = ordinal
                    if decision is None:
                        continue
                    kept, merged = decision[u]
                    kept = at[kept.to(span.device)]
                    whole.keep[b, at] = False
                    whole.keep[b, kept] = True
                    if merged is not None:
                        at_row.append(torch.full_like(kept, b))
                        at_col.append(kept)
                        vectors.append(merged.to(at.device))
                whole.kept[b].append(whole.keep[b, span].nonzero()[:, 0])
                whole.tokens[b].append(tokens[i])
        if vectors:
            old = [[t] for t in whole.merged] if whole.merged is not None else [[], [], []]
            parts = [a + b for a, b in zip(old, (at_row, at_col, vectors))]
            whole.merged = torch.cat(parts[0]), torch.cat(parts[1]), torch.cat(parts[2])


def images_per_row(visual: Tensor, rows: Sequence[int]) -> list[list[int]] | None:
    """Which images stand in each row, images being consumed in (row, sequence) order; None if they do not fit.

    Args:
        visual: (B, L) bool; after beam expansion the rows of a sample are adjacent copies and share its images.
        rows: placeholders per image.
    """
    per_row, have = visual.sum(1).tolist(), sum(rows)
    copies = sum(per_row) // have if have else 0
    if not copies or sum(per_row) != copies * have or len(per_row) % copies:
        return None
    out: list[list[int]] = []
    image = 0
    for start in range(0, len(per_row), copies):
        want, mine = per_row[start], []
        while want > 0 and image < len(rows):
            want -= rows[image]
            mine.append(image)
            image += 1
        if want or any(n != per_row[start] for n in per_row[start : start + copies]):
            return None
        out += [mine] * copies
    return out


def _stands_in(encoded: Encoded, rows: list[list[int]], x: Tensor, visual: Tensor, here: slice) -> bool:
    """Whether the embeddings at the placeholders are those that the model encoded in its last run."""
    for b, mine in enumerate(rows):
        first, n = int(visual[b, : here.start].sum()), int(visual[b, here].sum())
        if n:
            features = encoded.images[mine[0]] if len(mine) == 1 else torch.cat([encoded.images[i] for i in mine])
            at = visual[b, here].nonzero()[:, 0]
            start, stop = int(at[0]), int(at[-1]) + 1
            there = x[b, start:stop] if stop - start == n else x[b, at]
            if not torch.equal(there, features[first : first + n].to(x)):
                return False
    return True
