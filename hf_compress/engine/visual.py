"""Where the images of a forward stand in its prompt, and where the decision of the vision stage falls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.engine import content
from hf_compress.engine.book import Book, Placement
from hf_compress.engine.encoded import Encoded, Question, Setting
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.state import IGNORED, Forward, State
from hf_compress.engine.vision import decide
from hf_compress.patches.base import Architecture
from hf_compress.signals import QUESTION
from hf_compress.tensors.rows import compact

MakeLooks = Callable[[Tensor, Tensor, list[int]], Any]  # visual rows, places of tokens, where those of units begin


class VisualPrompt:
    """Finds the images of a forward in its prompt and takes the decision of the vision stage for them.

    Args:
        stage: the vision stage, or None where only later stages need to know which rows are visual.
        images: whether image boundaries matter to anybody (else only the visual rows are marked).
    """

    def __init__(self, model: nn.Module, adapter: Architecture, state: State, stage: Budgeted | None, images: bool):
        self.model, self.adapter, self.state, self.stage, self.images = model, adapter, state, stage, images
        self.ids = adapter.placeholders(model.config)
        self._asks = stage is not None and QUESTION in stage.method.reads(0)

    def visual(self, ids: Tensor) -> Tensor:
        """(B, L) bool: the placeholders in `ids`."""
        return functools.reduce(torch.logical_or, [ids == token for token in self.ids.values()])

    def locate(
        self, now: Forward, x: Tensor, earlier: Tensor | None = None, looks: MakeLooks | None = None
    ) -> Placement | None:
        """The placement for the rows of this forward; None where nothing is visual (in chunks: of the whole).

        Args:
            x: (B, q, D) what enters the language model, image features in place.
            earlier: (B,) int64, images that each row showed in turns before; they are counted on.
            looks: gives what the prompt looks at, for methods that read layers of the language model.

        Raises:
            ValueError: image features and placeholders do not match, the method cannot read these images, or the last
                chunk of a prompt is gone as a whole.
        """
        if now.given.ids is None or not self.ids or self._blind(now):
            return None
        ids, start = self._whole_prompt(now)
        ids, here = ids.to(x.device), slice(start, start + x.shape[1])
        visual = self.visual(ids)
        chunk = self.state.chunked is not None and start < ids.shape[1]  # of text alone it may be told of images, too
        if not bool((visual if chunk else visual[:, here]).any()):
            return None
        if not self.images:
            return Placement(torch.ones_like(visual), visual.long() - 1).columns(here)
        keep = torch.ones(ids.shape, dtype=torch.bool, device=x.device)
        image = torch.full(ids.shape, -1, dtype=torch.int64, device=x.device)
        # what a whole prompt shows that is fed in chunks is counted from its start
        before = [0] * len(ids) if earlier is None or self.state.chunked is not None else earlier.tolist()
        first = 0 if self.state.chunked is not None else now.given.past
        book = Book(keep, image, [[] for _ in before], [], before, first, [[] for _ in before], [[] for _ in before])
        whole = Placement(keep, image, book=book)
        for modality, token in self.ids.items():
            mine = ids == token
            if bool(mine.any()):
                encoded, rows = self._images(now, modality, x, mine, here)
                of = None if now.given.packing is None else now.given.packing.sample[mine].tolist()
                asked = self._question(now, ids, mine, encoded, rows) if self._asks else None
                setting = Setting({}, {}, asked)
                if looks is not None:
                    setting.looks = functools.partial(looks, visual)
                self._place(whole, mine, encoded, rows, of, setting)
        if whole.number is not None:
            whole.keep = torch.ones_like(keep)
        if here.start and here.stop == ids.shape[1] and not bool(keep[:, here].any(1).all()):
            raise ValueError(
                f"prefill_chunk_size: a prompt ends with an image of which nothing stays in the last {x.shape[1]} "
                "rows, and the answer is predicted from these; use another chunk size, or put text behind the image"
            )
        return whole.columns(here)

    def content(self, now: Forward, x: Tensor) -> Tensor:
        """(B,) int64: a number for what each row of a prompt says and shows; `x` (B, q, D) is what it enters as."""
        real = None if now.given.mask is None else now.given.mask[:, -x.shape[1] :].bool()
        what = x if now.given.ids is None else now.given.ids
        out = content.of_rows(what, real).to(x.device)
        if now.given.ids is None or self._blind(now):
            return out
        given = now.given.inputs.get("mm_encoder_outputs") or {}
        for modality, token in self.ids.items():
            if modality in self.state.encoded or given.get(modality) is not None:
                visual = (now.given.ids == token).to(x.device)
                encoded, rows = self._images(now, modality, x, visual, slice(0, x.shape[1]))
                images = content.of_images(self.adapter, self.model, encoded)
                out = content.with_images(out, images, rows)
        return out

    def _blind(self, now: Forward) -> bool:
        """Whether placeholders are read as text: transformers gives a draft no features."""
        run = self.state.run
        return run is not None and run.draft and not now.given.inputs.get("mm_encoder_outputs")

    def _whole_prompt(self, now: Forward) -> tuple[Tensor, int]:
        """Ids in which the images are counted, and where this forward starts in them."""
        assert now.given.ids is not None
        prompt = self.state.chunked
        if prompt is None:
            return now.given.ids, 0
        return prompt.repeat_interleave(now.given.ids.shape[0] // prompt.shape[0], 0), now.given.past

    def _images(
        self, now: Forward, modality: str, x: Tensor, visual: Tensor, here: slice
    ) -> tuple[Encoded, list[list[int]]]:
        """The images of the prompt, looked for once per forward."""
        key = ("images", modality)
        if key not in now.notes.memo:
            now.notes.memo[key] = self._find(now, modality, x, visual, here)
        return now.notes.memo[key]

    def _find(
        self, now: Forward, modality: str, x: Tensor, visual: Tensor, here: slice
    ) -> tuple[Encoded, list[list[int]]]:
        """The same, checked against the features that really stand in it."""
        encoded = self.state.encoded.get(modality)
        given = (now.given.inputs.get("mm_encoder_outputs") or {}).get(modality)
        if encoded is not None:
            rows = images_per_row(visual, encoded.rows)
            known = given is not None and given.pooler_output is encoded.source
            if rows is not None and (known or _stands_in(encoded, rows, x, visual, here)):
                return self._pictures(now, encoded, rows, visual)
        if given is not None:
            images = self.adapter.images(self.model, modality, given, now.given.inputs)
            rows = images_per_row(visual, [len(i) for i in images])
            if rows is not None:
                units = self.adapter.units(self.model, modality, images, now.given.inputs)
                encoded = Encoded(None, images, units, modality=modality)
                return self._pictures(now, encoded, rows, visual)
        have = encoded.rows if encoded is not None else []
        raise ValueError(
            f"{modality} features and placeholders do not match: input_ids holds {visual.sum(1).tolist()} {modality} "
            f"tokens per row, the {modality}s give {have}; build input_ids and pixel values with one processor call, "
            f"one {modality} per placeholder"
        )

    def _pictures(
        self, now: Forward, encoded: Encoded, rows: list[list[int]], visual: Tensor
    ) -> tuple[Encoded, list[list[int]]]:
        """Tiles with placeholders of their own joined to the pictures that they are cut from."""
        if not self.adapter.tiles or all(len(mine) < 2 for mine in rows):
            return encoded, rows
        prompts = self._whole_prompt(now)[0].tolist()
        samples = (
            [[0] * visual.shape[1]] * len(rows) if now.given.packing is None else now.given.packing.sample.tolist()
        )
        counts: dict[int, int] = {}  # first tile of each picture: tiles
        for ids, mine, at, of in zip(prompts, rows, visual, samples):
            places, first, stop, end = at.nonzero()[:, 0].tolist(), 0, 0, 0
            for k, tile in enumerate(mine):
                begin = places[stop]
                if not k or of[begin] != of[end - 1] or not self.adapter.same_picture(ids[:begin], begin - end):
                    first = tile
                counts[first] = tile - first + 1
                stop += encoded.rows[tile]
                end = places[stop - 1] + 1
        joined, starts = encoded.joined(list(counts.values())), {tile: i for i, tile in enumerate(counts)}
        return joined, [[starts[tile] for tile in mine if tile in starts] for mine in rows]

    def _question(self, now: Forward, ids: Tensor, visual: Tensor, encoded: Encoded, rows: list[list[int]]) -> Question:
        """The text behind each image, in its sample and without answers, given or generated."""
        now.given.check_told()
        text, packing = ~self.visual(ids), now.given.packing
        if now.given.prompt_rows is not None:
            text[:, max(0, now.given.prompt_rows - (0 if self.state.chunked is not None else now.given.past)) :] = False
        if (mask := self.state.mask if self.state.chunked is not None else now.given.mask) is not None:
            text &= mask[:, -ids.shape[1] :].to(text.device).bool().repeat_interleave(len(ids) // len(mask), 0)
        if (labels := now.given.inputs.get("labels")) is not None:
            text &= labels.to(text.device) == IGNORED
        shown = {i: (b, n) for b, mine in enumerate(rows) for i, n in zip(mine, _ends(encoded.rows, mine))}
        places = [at.nonzero()[:, 0] for at in visual]
        row = torch.tensor([shown[i][0] for i in range(len(encoded.images))], device=ids.device)
        last = torch.stack([places[b][n - 1] for b, n in (shown[i] for i in range(len(encoded.images)))])
        behind = text[row] & (torch.arange(ids.shape[1], device=ids.device) > last[:, None])
        if packing is not None:
            sample = packing.sample.to(ids.device)[row]
            behind &= sample == sample.gather(1, last[:, None])
        at, real = compact(behind)
        return Question(ids[row].gather(1, at), real, row, at)

    def _place(
        self,
        whole: Placement,
        visual: Tensor,
        encoded: Encoded,
        rows: list[list[int]],
        of: list[int] | None,
        setting: Setting,
    ) -> None:
        """Add the images of one modality to a placement; all of them at once, however many rows there are.

        `of`: per placeholder the sample of its row, where samples are packed.
        """
        assert whole.book is not None
        book, device = whole.book, visual.device
        units_of: dict[int, list[int]] = {}
        for u, unit in enumerate(encoded.units):
            units_of.setdefault(unit.image, []).append(u)
        tokens, lengths, crops = encoded.tokens(), encoded.rows, encoded.crops()
        standing: list[int] = []  # units in the order of the prompt
        sizes: list[int] = []  # tokens of each
        marks: list[tuple[int, int]] = []  # of each: first placeholder of its image, number of the image
        start = 0
        for b, mine in enumerate(rows):
            for i in mine:
                nth = book.earlier[b] + len(book.tokens[b])
                standing += units_of.get(i, [])
                sizes += [encoded.sizes[u] for u in units_of.get(i, [])]
                marks += [(start, nth)] * len(units_of.get(i, []))
                sample = 0 if of is None else of[start]
                setting.samples[i] = b, sample
                setting.ordinals[i] = book.earlier[b] + book.sample[b].count(sample)
                book.tokens[b].append(tokens[i])
                book.crops[b].append(crops[i])
                book.sample[b].append(sample)
                start += lengths[i]
        book.spans.append((visual, [[lengths[i] for i in mine] for mine in rows]))
        counts, of_unit = torch.tensor(sizes, device=device), torch.tensor(marks, device=device).view(-1, 2)
        first, number = of_unit.repeat_interleave(counts, 0, output_size=sum(sizes)).unbind(1)  # of every visual token
        at = torch.cat([encoded.units[u].rows for u in standing]).to(device) + first
        where = visual.flatten().nonzero()[:, 0].take(at)
        whole.image.view(-1).index_copy_(0, where, number)
        if self.stage is not None:
            now = self.state.forward
            setting.losses = [] if now is None else now.notes.losses
            starts = accumulate(sizes, initial=0)
            begin = torch.tensor([start for _, start in sorted(zip(standing, starts))], device=where.device)
            begin = begin.view(len(encoded.units), -1).T  # (copies of a sample, units)
            if setting.looks is not None:
                setting.looks = setting.looks(where, begin[0].tolist())
            self._cut(whole, encoded, setting, begin, where)

    def _cut(
        self,
        whole: Placement,
        encoded: Encoded,
        setting: Setting,
        begin: Tensor,
        where: Tensor,
    ) -> None:
        """Take the decision for the units that stand in the prompt.

        Args:
            where: the places of their tokens; begin: (copies, units), where those of each unit begin among them.
        """
        assert self.stage is not None
        decision = decide(self.stage, self.adapter, self.model, encoded, setting)
        if self.stage.method.passes:
            _number(whole, torch.cat([begin[:, choice.units].flatten() for choice in decision]), where)
        flat, L = whole.keep.view(-1).index_fill_(0, where, False), whole.keep.shape[1]
        for choice in decision:
            kept = where.take(begin[:, choice.units, None] + choice.kept.to(where.device))  # (copies, n, K)
            real = kept.flatten() if choice.valid is None else kept[choice.valid.to(kept.device).expand_as(kept)]
            flat.index_fill_(0, real, True)
            for name, told in choice.noted.items():
                at = where.take(begin[:, choice.units, None] + torch.arange(told.shape[1], device=where.device))
                known = whole.noted.setdefault(name, torch.zeros(whole.keep.shape, device=where.device))
                known.view(-1).index_copy_(0, at.flatten(), told.to(known).expand(at.shape).flatten())
            if choice.owners is not None:
                _own(whole, begin[:, choice.units, None], choice.owners.to(where.device), where)
            if choice.told is not None:
                _tell(whole, [encoded.units[u].image for u in choice.units], choice.told, setting, len(begin))
            if choice.mixed is None or choice.vectors is None:
                continue
            slots = kept[choice.mixed.to(where.device).expand_as(kept)]
            new = (slots // L, slots % L, choice.vectors.repeat(len(kept), 1))
            old = whole.merged
            whole.merged = new if old is None else tuple(torch.cat(pair) for pair in zip(old, new))  # type: ignore


def _tell(whole: Placement, images: list[int], told: Tensor, setting: Setting, copies: int) -> None:
    """Note what the text behind some images is told, (n, T, D)."""
    assert setting.question is not None
    asked, (n, T) = setting.question, told.shape[:2]
    last = slice(asked.at.shape[1] - T, None)  # padded at the left
    at, real = asked.at[images, last], asked.real[images, last]
    rows = asked.row[images] - torch.arange(copies, device=at.device)[:, None]  # (copies, n)
    real = real.expand(copies, n, T)
    new = (rows[..., None].expand_as(real)[real], at.expand_as(real)[real], told.expand(copies, *told.shape)[real])
    old = whole.told
    whole.told = new if old is None else tuple(torch.cat(pair) for pair in zip(old, new))  # type: ignore


def _number(whole: Placement, begin: Tensor, where: Tensor) -> None:
    """Number the sequences of tokens at `where`, each from one of `begin` to the next one."""
    first = torch.zeros_like(where).index_fill(0, begin, 1)
    old = whole.number if whole.number is not None else torch.zeros_like(whole.image)
    whole.number = old.flatten().index_copy(0, where, first.cumsum(0) + old.max()).view_as(old)


def _own(whole: Placement, begin: Tensor, owners: Tensor, where: Tensor) -> None:
    """Note what the tokens of some units, which begin at `begin` (copies, n, 1), were merged into."""
    B, L = whole.keep.shape
    if whole.owner is None:
        columns = torch.arange(L, device=where.device).expand(B, -1)
        whole.owner = columns.contiguous()
        if whole.book is not None:
            whole.book.owner = whole.owner
    mine = where.take(begin + torch.arange(owners.shape[1], device=where.device))
    into = where.take(begin + owners.clamp(min=0)) % L
    whole.owner.view(-1).index_copy_(0, mine.flatten(), into.masked_fill(owners < 0, -1).flatten())


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


def _ends(lengths: Sequence[int], images: Sequence[int]) -> list[int]:
    """Placeholders up to the end of each of the `images` of a row."""
    return list(accumulate(lengths[i] for i in images))


def _stands_in(encoded: Encoded, rows: list[list[int]], x: Tensor, visual: Tensor, here: slice) -> bool:
    """Whether the embeddings at the placeholders are those that the model encoded in its last run.

    The first, middle and last row of every image are compared: a tower mixes the whole image into each.
    """
    places = visual.flatten().nonzero()[:, 0]
    L, at, expected, start = visual.shape[1], [], [], 0
    for mine in rows:
        for i in mine:
            image = encoded.images[i]
            n = len(image)
            probes = (0, n // 2, n - 1)
            at += [start + p for p in probes]
            expected += [image[p] for p in probes]
            start += n
    flat = places[torch.tensor(at, device=places.device)]
    b, col = flat // L, flat % L
    features = torch.stack(expected).to(x)
    if here.start or here.stop != L:  # a chunk of the prompt
        inside = (col >= here.start) & (col < here.stop)
        b, col, features = b[inside], col[inside] - here.start, features[inside]
    return torch.equal(x[b, col], features)
