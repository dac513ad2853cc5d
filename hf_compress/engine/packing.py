"""Several samples packed into one row: which rows belong together, as far as the model itself keeps them apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.engine.state import Forward
from hf_compress.layout import Layout

Rotations = tuple[Tensor, Tensor]


class Samples(NamedTuple):
    """Rows of a packed batch as a batch of samples.

    Attributes:
        rows: (n, W) int64, rows of the flattened batch, those of a sample at the right end.
        real: (n, W) bool, False on slots that only fill up.
    """

    rows: Tensor
    real: Tensor

    def split(self, x: Tensor) -> Tensor:
        """(B or 1, S, ...) to (n, W, ...); what stands in slots that only fill up is anything."""
        return x.flatten(0, 1)[self.rows.to(x.device)]

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        """(n, W) bool back to the shape of `like` (B, S), False on rows of no sample."""
        out = torch.zeros(like.numel(), dtype=torch.bool, device=x.device)
        return out.index_copy_(0, self.rows[self.real], x[self.real]).view(like.shape)


@dataclass
class Packing:
    """Which rows of a forward belong together; samples are numbered through the batch, row by row.

    Attributes:
        sample: (B, q) int64, which sample of its batch row each row belongs to, ascending.
        before: (B, q) int64, the row that each row follows, -1: none. First rows may follow another sample, which
            several then share (a prompt and its answers).
        counts: samples per batch row.
        flash: the kernel takes lengths of samples, not masks.
    """

    sample: Tensor
    before: Tensor
    counts: list[int]
    flash: bool = False

    def total(self, count: Tensor) -> Tensor:
        """(B, q): sum of `count` (B, q) over every row and all that it follows."""
        at = self.before
        for _ in range((at.shape[1] - 1).bit_length()):  # twice as far back at every turn
            back, none = at.clamp(min=0), at < 0
            count = count + count.gather(1, back).masked_fill(none, 0)
            at = at.gather(1, back).masked_fill(none, -1)
        return count

    def numbers(self, local: Tensor) -> Tensor:
        """(B, S): sample of each of the rows `local` (B, S), numbered through the batch."""
        first = torch.tensor([0, *accumulate(self.counts[:-1])], device=local.device)
        return self.sample.to(local.device).gather(1, local) + first[:, None]

    def sight(self, local: Tensor) -> Tensor:
        """(B, 1, S, S) bool: which of the rows `local` (B, S) belong to one sample."""
        number = self.numbers(local)
        return number[:, None, :, None] == number[:, None, None, :]

    def per_sample(self, rows: Tensor, local: Tensor) -> list[int]:
        """How many of the rows `local` (B, S) are True in `rows`, sample by sample."""
        return torch.bincount(self.numbers(local)[rows], minlength=sum(self.counts)).tolist()

    def first_slots(self, local: Tensor, valid: Tensor) -> Tensor:
        """(B, q): for every row the first slot of its sample among the rows `local` (B, S)."""
        held = self.sample.gather(1, local).masked_fill(~valid, -1)  # what only fills up stands at the left
        return torch.searchsorted(held, self.sample)

    def samples(self, layout: Layout, local: Tensor) -> Samples:
        """The rows alive, sample by sample."""
        alive = layout.valid.flatten().nonzero()[:, 0]  # in the order of the samples
        sizes = torch.bincount(self.numbers(local).flatten()[alive], minlength=sum(self.counts))
        widest = int(sizes.max())
        stop = sizes.cumsum(0)[:, None]
        at = stop - widest + torch.arange(widest, device=stop.device)
        real = at >= stop - sizes[:, None]
        return Samples(alive[at.clamp(min=0)], real)

    def arguments(self, local: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """What kernels for packed rows are told, for the rows `local` (1, S) alive; of `given` what it names."""
        number = self.numbers(local)
        out: dict[str, Any] = {}
        if given.get("seq_idx") is not None:
            out["seq_idx"] = number.to(given["seq_idx"])
        if len(local) == 1 and (self.flash or given.get("cu_seq_lens_q") is not None):
            sizes = torch.bincount(number[0], minlength=self.counts[0])
            ends, longest = F.pad(sizes.cumsum(0), (1, 0)).int(), int(sizes.max())
            out |= dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest)
        return out

    def alone(
        self, now: Forward, layer: int, x: Tensor, rotary: Rotations
    ) -> tuple[Forward, Tensor, Rotations, Samples]:
        """The rows that enter a layer as a padded batch of samples: forward, states (n, W, D), rotations, samples."""
        samples = self.samples(now.layout, now.local)
        counts = torch.tensor(self.counts, device=now.local.device)
        owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=sum(self.counts))
        index, position, image, _ = (samples.split(t) for t in now.layout.slots)
        layout = Layout(index, position, image, samples.real, now.layout.removed[owner], now.layout.seen)
        inputs, records = dict(now.inputs), {}
        if torch.is_tensor(labels := inputs.get("labels")):
            inputs["labels"] = labels[owner.to(labels.device)]
        if (record := now.records.get(layer - 1)) is not None:
            query, key = (samples.split(t.transpose(1, 2)).transpose(1, 2) for t in record[:2])
            records[layer - 1] = query, key, record[2]
        cos, sin = (samples.split(t.expand(len(counts), -1, -1)) for t in rotary)
        one = replace(now, inputs=inputs, layout=layout, local=samples.split(now.local), records=records, packing=None)
        return one, samples.split(x), (cos, sin), samples


def find(now: Forward, kw: dict[str, Any], config: Any, mrope: bool) -> Packing | None:
    """How the model itself will read its rows; None: every row as one sample.

    Ready-made masks say it of every kernel. Else transformers looks at the position ids of text where there is neither
    a cache nor a 2-D mask: a step other than 1 begins a sample. Flash attention also takes the lengths of the samples.

    Args:
        kw: arguments of the language model, by name; config: its config; mrope: whether positions have several axes.
    """
    mask, lengths, (B, q) = kw.get("attention_mask"), kw.get("cu_seq_lens_q"), now.size
    own = now.inputs.get("attention_mask")
    asked = now.inputs.get("position_ids") is not None or lengths is not None
    if now.past or q < 2 or not (asked or (own is not None and now.ready_made)):
        return None
    if now.ready_made:
        return of_mask(mask, B) if now.mask is None else None  # what is made of a 2-D mask packs nothing
    flash, text = "flash" in config._attn_implementation, _text(kw.get("position_ids"), mrope)
    if flash and B == 1 and lengths is not None:
        first = torch.zeros(1, q, dtype=torch.bool, device=lengths.device)
        first[0, lengths[:-1].long()] = True
        return _of_firsts(first, flash=True)
    padded = now.mask is not None and not (flash and bool(now.mask.all()))
    if text is None or padded or (B > 1 if flash else now.cache is not None):
        return None
    first = text == text.min() if flash else F.pad(text.diff(dim=-1) != 1, (1, 0), value=True)
    return _of_firsts(first.expand(B, q), flash=flash)


def _text(positions: Tensor | None, mrope: bool) -> Tensor | None:
    """(B or 1, q) position ids that count tokens; None: there are only those of axes."""
    if positions is None or positions.ndim == 2:
        return None if mrope else positions
    return positions[0] if len(positions) == 4 else None


def of_mask(mask: Any, rows: int) -> Packing | None:
    """From masks (rows or 1, h, q, past + q), one or one per kind of layer: what does not see the row before begins."""
    masks = list(mask.values()) if isinstance(mask, dict) else [mask]
    given = next((m for m in masks if m is not None), None)
    if given is None or given.ndim != 4:
        return None
    see = given[:, 0, :, -given.shape[2] :].expand(rows, -1, -1)
    see = see > torch.finfo(see.dtype).min / 2 if see.is_floating_point() else see.bool()
    first = F.pad(~see.diagonal(-1, 1, 2), (1, 0), value=True)
    return _of_firsts(first, see)


def _of_firsts(first: Tensor, see: Tensor | None = None, flash: bool = False) -> Packing | None:
    """From the rows with which samples begin (B, q), and what rows see (B, q, q); None: nothing but samples."""
    counts = first.sum(1).tolist()
    if max(counts) <= 1:
        return None
    q = first.shape[1]
    before = torch.arange(-1, q - 1, device=first.device).masked_fill(first, -1)
    if see is not None:
        b, row = first.nonzero().unbind(1)
        earlier = see[b, row] & (torch.arange(q, device=row.device) < row[:, None])
        last = (earlier * torch.arange(1, q + 1, device=row.device)).amax(1) - 1
        before[b, row] = last
    return Packing(first.long().cumsum(1) - 1, before, counts, flash)


def starts_anew(positions: Any, mask: Tensor | None) -> bool:
    """Whether position ids fall back to the first one inside a row; `mask` (B, past + q) 2-D, None: no padding."""
    if not torch.is_tensor(positions) or positions.shape[-1] < 2:
        return False
    row = positions[0] if positions.ndim == 3 else positions
    fell = row.diff(dim=-1) < 0
    if mask is None:
        return bool((fell & (row[:, 1:] == row.amin(-1, keepdim=True))).any())
    real = mask[:, -row.shape[1] :].bool().to(row.device)
    least = row.masked_fill(~real, torch.iinfo(row.dtype).max).amin(-1, keepdim=True)
    return bool((fell & real[:, 1:] & real[:, :-1] & (row[:, 1:] == least)).any())
