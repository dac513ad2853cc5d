"""How the attention of the layers looks at what is stored: masks, a part of the entries, or an output of its own."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hf_compress.signals import Reading, Slots


class Reader:
    """What `CacheMethod.reader` answers with; as it stands, every row looks at everything before it.

    Nothing of it acts at ratio 0, nor in further forwards over a prompt.
    """

    def sight(self, keys: Slots, queries: Slots) -> Tensor | None:
        """(B, 1 or Hkv, q, S) bool: what each of the `queries` may see of the `keys`; None: all.

        Goes into the mask of every layer, in training also without a cache, for prompt and steps alike, beside
        causality, padding and windows; a row always sees itself. Decide by the caller's rows (`index`, `image`), never
        by columns: layers may hold different entries. It makes attention materialise a mask of rows times entries,
        which costs a causal prompt about twice its time.
        """
        return None

    def choose(self, reading: Reading) -> Tensor | None:
        """(B, 1 or Hkv, q, S) bool: what each row reads of that which it may see; None: all.

        Unlike `sight` it may hang on queries and keys. A row always reads itself. The layer's own kernel runs, under a
        mask that is materialised. Asked in the layers that the method acts on, for prompt and steps, in training also
        without a cache, but not under gradient checkpointing, which is refused.
        """
        return None

    def look(self, reading: Reading) -> Tensor | None:
        """(B, Hkv, n) int64: the older entries that a single new row reads beside its own, each once; None: all.

        Keys, values and mask are gathered, and the layer's own kernel runs over them. Asked in the layers that the
        method acts on, at every step of one token; several tokens fed together read everything.
        """
        return None

    def attend(self, reading: Reading) -> Tensor | None:
        """(B, q, Hq, d') the output of the attention itself, differentiable; None: the layer's own.

        Asked in the layers that the method acts on, for prompt and steps, in training also without a cache, but not
        under gradient checkpointing, which is refused.
        """
        return None

    turns: ClassVar[bool] = False  # it calls `Reading.turn`, which takes positions of one number, and causal rows

    @property
    def hides(self) -> bool:
        """Whether it has a `sight`."""
        return type(self).sight is not Reader.sight

    @property
    def chooses(self) -> bool:
        """Whether it has a `choose`."""
        return type(self).choose is not Reader.choose

    @property
    def looks(self) -> bool:
        """Whether it has a `look`."""
        return type(self).look is not Reader.look

    @property
    def attends(self) -> bool:
        """Whether it `attend`s itself."""
        return type(self).attend is not Reader.attend
