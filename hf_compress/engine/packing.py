"""Several samples packed into one row: which rows belong together, as far as the model itself keeps them apart."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
        """(n, W, ...) back to the shape of `like` (B, S), zero on rows of no sample."""
        out = x.new_zeros(like.numel(), *x.shape[2:])
        at, real = self.rows.to(x.device), self.real.to(x.device)
        return out.index_copy_(0, at[real], x[real]).view(*like.shape, *x.shape[2:])


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


def of_mask(mask: Any, rows: int) -> Packing | None:
    """From masks (rows or 1, h, q, past + q), one or one per kind of layer: what does not see the row before begins.

    Unless one of them is (rows, q) and says that the row is padding.
    """
    masks = [m for m in (mask.values() if isinstance(mask, dict) else [mask]) if m is not None]
    given, real = (next((m for m in masks if m.ndim == n), None) for n in (4, 2))
    if given is None:
        return None
    see = given[:, 0, :, -given.shape[2] :].expand(rows, -1, -1)
    see = see > torch.finfo(see.dtype).min / 2 if see.is_floating_point() else see.bool()
    first = F.pad(~see.diagonal(-1, 1, 2), (1, 0), value=True)
    first = first if real is None else first & real.bool()
    return of_firsts(first, see)


def of_firsts(first: Tensor, see: Tensor | None = None, flash: bool = False) -> Packing | None:
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
