"""What rows of a prompt look at in a layer of the language model, for visual tokens that stand in it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.engine.further import Ahead
from hf_compress.engine.state import Forward
from hf_compress.engine.visual import MakeLooks


@dataclass
class Looks:
    """The units of a call in the prompts of a forward.

    Attributes:
        ahead: a further forward over the prompts.
        may: (B, q) bool, rows that may vote: of the prompt, before whatever carries a label.
        visual: (B, q) bool.
        where: flat places (row * q + column) of the tokens of all units, unit behind unit as they stand in the prompts.
        begin: of every unit, where its tokens begin in `where`.
    """

    ahead: Ahead
    may: Tensor
    visual: Tensor
    where: Tensor
    begin: Sequence[int]

    def attention(self, layer: int, rows: str, sequences: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor:
        """(n, H, N) fp32: what these rows attend to, mean over them.

        Args:
            rows: one of `signals.LOOKS`; sequences: the units of each of n sequences; sizes: tokens of every unit.
        """
        q = self.may.shape[1]
        parts = [torch.cat([self.where[self.begin[u] :][: sizes[u]] for u in units]) for units in sequences]
        places = torch.stack(parts)
        sample, column = places[:, 0] // q, places % q
        voters = self._voters(rows, sample, column)
        turns, row = self._turns(sample, voters), sample.tolist()
        out: list[Tensor] = [places] * len(parts)
        for turn in range(max(turns) + 1):
            mine = [i for i, at in enumerate(turns) if at == turn]
            votes = torch.zeros_like(self.may).index_copy(0, sample[mine], voters[mine])
            given = self.ahead.attention(layer, votes)
            for i in mine:
                out[i] = given[row[i]][:, column[i]]
        return torch.stack(out)

    def _voters(self, rows: str, sample: Tensor, column: Tensor) -> Tensor:
        """(n, q) bool."""
        at = torch.arange(self.may.shape[1], device=column.device)
        may = self.may[sample]
        if (packing := self.ahead.prompt.packing) is not None:
            number = packing.sample.to(at.device)[sample]
            may = may & (number == number.gather(1, column[:, :1]))
        if rows == "last":
            return may & (at == (may * at).amax(1, keepdim=True))
        behind = may & (at > column.amax(1, keepdim=True))
        return behind if rows == "later" else behind & ~self.visual[sample]

    @staticmethod
    def _turns(sample: Tensor, voters: Tensor) -> list[int]:
        """Which of several passes over the rows answers each sequence: one for all that have the same voters."""
        known: dict[int, list[int]] = {}
        turns = []
        for i, b in enumerate(sample.tolist()):
            alike = [k for k, j in enumerate(known.setdefault(b, [])) if torch.equal(voters[i], voters[j])]
            if not alike:
                known[b].append(i)
            turns.append(alike[0] if alike else len(known[b]) - 1)
        return turns


def looks_of(now: Forward, ahead: Ahead) -> MakeLooks:
    """What makes the `Looks` of a forward, when it is known where its images stand."""
    now.given.check_told()
    return functools.partial(Looks, ahead, ahead.prompt.unanswered)
