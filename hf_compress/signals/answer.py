"""What a method answers: which tokens survive, and what is written into them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.merge import first_members
from hf_compress.tensors.rows import compact


@dataclass
class Assignment:
    """Which of N tokens survive and what is written into the survivors, for n images at once.

    Attributes:
        kept: (n, K) int64, ascending token indices (inside a tower in the method's own order); the k-th output takes
            the slot and the position of `kept[:, k]`.
        groups: (n, N) int64 or None. The output row that each token is merged into, -1 for a token that vanishes.
            None: pure selection, outputs are the kept tokens as they are.
        weight: (n, N) float or None. Output k is `sum_j weight_j * x_j` over its group; None means the plain mean.
        dense: (n, K, N) float or None. Full mixing matrix, for methods whose assignment is not a partition.
        before_projector: merge what the projector reads and project the merged vectors (else merge its output).
        valid: (n, K) bool or None. False on outputs that only fill up, at the left, where the n keep different counts.
    """

    kept: Tensor
    groups: Tensor | None = None
    weight: Tensor | None = None
    dense: Tensor | None = None
    before_projector: bool = False
    valid: Tensor | None = None

    @classmethod
    def selection(cls, stays: Tensor) -> Assignment:
        """The tokens that are True in `stays` (n, N), as they are."""
        rows, valid = compact(stays)
        return cls(rows, valid=None if bool(valid.all()) else valid)

    @classmethod
    def owned(cls, owner: Tensor, weight: Tensor | None = None) -> Assignment:
        """Tokens that stay, or are merged into one that does.

        Args:
            owner: (n, N) int64, the token that each goes into: itself where it stays, -1 where it vanishes.
            weight: (n, N), as of the class.
        """
        own = torch.arange(owner.shape[1], device=owner.device)
        stays = owner == own
        out = cls.selection(stays)
        place = (stays.long().cumsum(1) - 1 + out.kept.shape[1] - stays.sum(1, keepdim=True)).gather(1, owner.clamp(0))
        return cls(out.kept, torch.where(owner < 0, -1, place), weight, valid=out.valid)

    def stays(self, tokens: int) -> Tensor:
        """(n, N) bool: which of the `tokens` N have an output of their own."""
        real = torch.ones_like(self.kept) if self.valid is None else self.valid.long()
        count = real.new_zeros(len(real), tokens).scatter_add(1, self.kept, real)  # one that fills up may be any
        return count.bool()

    @property
    def owners(self) -> Tensor | None:
        """(n, N) int64, of every token the first one of its group, -1 of what vanishes; None: there are no groups."""
        if self.groups is None:
            return None
        outputs = self.kept.shape[1] + 1  # the last one collects what vanishes
        first = first_members(self.groups % outputs, outputs).gather(1, self.groups % outputs)
        return first.masked_fill_(self.groups < 0, -1)

    @property
    def merges(self) -> bool:
        """Whether outputs differ from the kept tokens themselves."""
        return self.groups is not None or self.dense is not None

    @property
    @own_precision
    def mixed(self) -> Tensor:
        """(n, K) bool: outputs that are anything but the kept token as it is."""
        real = torch.ones_like(self.kept, dtype=torch.bool) if self.valid is None else self.valid
        if self.groups is None or self.dense is not None:
            return real if self.dense is not None else torch.zeros_like(real)
        members = torch.zeros(self.kept.shape[0], self.kept.shape[1] + 1, device=self.kept.device)
        members = members.scatter_add(1, self.groups % members.shape[1], torch.ones_like(self.groups).float())[:, :-1]
        mixed = (members != 1) & real
        return mixed if self.weight is None else mixed | (self.weight.gather(1, self.kept) != 1)

    def pick(self, x: Tensor) -> Tensor:
        """(n, N, ...) of the tokens to (n, K, ...) of the kept ones, as they are."""
        n, N = x.shape[:2]  # whole rows are copied: a gather of elements is several times slower
        rows = self.kept + torch.arange(0, n * N, N, device=x.device)[:, None]
        return x.flatten(0, 1).index_select(0, rows.flatten()).view(n, -1, *x.shape[2:])

    @own_precision
    def apply(self, x: Tensor) -> Tensor:
        """(n, N, D) tokens to (n, K, D) outputs, differentiable in `x`."""
        if self.dense is not None:
            return self.dense.to(x.dtype) @ x
        if self.groups is None:
            return self.pick(x)
        n, K, D = x.shape[0], self.kept.shape[1], x.shape[-1]
        groups = self.groups % (K + 1)  # the last output collects what vanishes (-1)
        weight = self.weight
        if weight is None:
            size = torch.zeros(n, K + 1, device=x.device)
            weight = 1 / size.scatter_add_(1, groups, torch.ones_like(groups, dtype=torch.float32)).gather(1, groups)
        # whole rows are added (a scatter of elements is many times slower), in fp32: half precision loses large means
        rows = (groups + torch.arange(0, n * (K + 1), K + 1, device=x.device)[:, None]).flatten()
        out = torch.zeros(n * (K + 1), D, device=x.device)
        out = out.index_add(0, rows, (x.float() * weight[..., None]).flatten(0, 1))
        return out.view(n, K + 1, D)[:, :K].to(x.dtype)
