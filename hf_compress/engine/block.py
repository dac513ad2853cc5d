"""What a method sees of the block of a vision tower that is running."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from hf_compress.engine.reduction import Reduction
from hf_compress.engine.tokens import given, row_kind
from hf_compress.tensors.attention import Record


class BlockView:
    """The `Block` that a method sees: some crops of a tower, all of which have as many tokens left.

    Args:
        index: of the blocks in which the method acts; whole: its attention sees whole images.
        x: (R, D) all rows of the tower after the attention.
        module: what the method trains, see `Tokens`.
    """

    def __init__(
        self,
        name: str,
        now: Reduction,
        index: int,
        whole: bool,
        crops: list[int],
        x: Tensor,
        module: nn.Module | None,
    ):
        self._name, self._whole, self._crops, self._x = name, whole, crops, x
        self._rows, self._sizes, self._calls = now.rows, now.sizes, now.calls
        self.index, self.steps = index, len(now.blocks)
        self.has_cls = bool(now.rows.skip)
        self.module, self.losses = module, list[Tensor]()
        stored = [now.memory[crop] for crop in crops]
        self.memory: dict[str, Tensor] = {key: torch.stack([notes[key] for notes in stored]) for key in stored[0]}

    @functools.cached_property
    def _at(self) -> Tensor:
        return self._rows.of(self._crops, self._x.device)

    @functools.cached_property
    def hidden(self) -> Tensor:
        return self._rows.mean(self._x[self._at])

    @functools.cached_property
    def sizes(self) -> Tensor:
        if self._sizes is None:
            return torch.ones(
                self._at.shape[0], self._rows.counts[self._crops[0]], dtype=torch.float32, device=self._x.device
            )
        return self._rows.mean(self._sizes[self._at])

    @functools.cached_property
    def keys(self) -> Tensor:
        return self._rows.mean(self._heads("key").mean(1))

    @functools.cached_property
    def values(self) -> Tensor:
        return self._rows.mean(self._heads("value").transpose(1, 2)).transpose(1, 2)

    def attention(self, *, rows: str = "cls", surrogate: str | None = None, logits: bool = False) -> Tensor:
        if not self._whole:
            raise ValueError(
                f"method={self._name!r} asks for the attention of a block that sees windows of an image only; name "
                "Read('tower', EVERY, 'attention') in its reads(), and it is asked where whole images are seen"
            )
        rows = row_kind(self._name, rows, surrogate, self.has_cls)
        found = given(*self._record, rows=rows, logits=logits, skip=self._rows.skip, real=None)
        joined = self._rows.joined
        return found if joined == 1 else found.unflatten(2, (-1, joined)).mean(-1)

    @functools.cached_property
    def _record(self) -> Record:
        """Queries and keys of which the products are the logits, ln(size) among them: one more channel of both."""
        query, key, scaling = self._heads("query"), self._heads("key"), self._calls[0].scaling
        if self._sizes is None:
            return query, key, scaling
        size = self._sizes[self._at].log()[:, None, :, None].expand(*key.shape[:3], 1)
        one = query.new_full((*query.shape[:3], 1), 1 / scaling)
        return torch.cat([query, one], -1), torch.cat([key, size.to(key.dtype)], -1), scaling

    def _heads(self, what: str) -> Tensor:
        """(n, H, rows, d) of these crops."""
        found = [getattr(call, what).detach() for call in self._calls]
        if len(found) == 1 and (len(found[0]), found[0].shape[2]) == self._at.shape:
            return found[0]  # all of them, side by side
        return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in found])[self._at].transpose(1, 2)
