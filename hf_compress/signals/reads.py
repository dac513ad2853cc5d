"""What a method declares that it will read."""

from __future__ import annotations

from dataclasses import dataclass

LOOKS = ("last", "text", "later")  # rows of a prompt, see `Tokens.looked_at`
EVERY = -1  # of a `Read`: every layer, or block of the tower, that the method acts in


@dataclass(frozen=True)
class Read:
    """One thing that a method reads, declared once for all budgets: only what is declared can be asked for.

    Attributes:
        where: "tower", "layer" (of the language model) or "prompt".
        at: in the tower how many blocks before the one whose features the projector reads, over blocks that see the
            whole image, or `EVERY` one in which `TowerMethod.reduce` acts: with "attention" these are blocks that see
            the whole image; in the language model the layer, or `EVERY`.
        what: "attention" (its queries and keys), "changes" (for decoder methods: how the parts of a layer change its
            rows), in the tower also "key", "value" or "hidden" (states of its patches);
            of every layer that a cache method acts on "queries" (those of the prompt), "columns" (these, and the
            attention that each entry receives from all rows) or "again" (shares of attention in further forwards over
            the prompt); of the prompt "content", for vision methods "question", for prompt methods "loss". Vision and
            prompt methods read layers of the language model in a further forward over the whole prompt.
    """

    where: str
    at: int
    what: str

    @property
    def every(self) -> bool:
        """Whether it is read in every layer (or block) that the method acts in."""
        return self.where in ("layer", "tower") and self.at == EVERY


QUERIES, COLUMNS, AGAIN = (Read("layer", EVERY, what) for what in ("queries", "columns", "again"))
CONTENT, QUESTION, LOSS = (Read("prompt", 0, what) for what in ("content", "question", "loss"))


@dataclass(frozen=True)
class Repetition:
    """One further forward that feeds entries of a prompt again, to see which of them it looks at.

    It feeds the ids `before`, the entries [hint, first), the ids `after` and the entries [first, stop), at positions
    that continue the prompt; its rows rank the entries [first, stop), sharing their attention with the first `sinks`
    entries and with each other.
    """

    first: int
    stop: int
    hint: int
    sinks: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
