"""What a method sees and what it answers. Methods know these types and `tensors/`, nothing else.

Every signal is lazy: what a method does not ask for is not computed. All answers are decided without gradient; the
engine applies them with gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hf_compress.layout import compact
from hf_compress.tensors.ambient import own_precision

__all__ = [
    "Assignment",
    "Block",
    "CacheView",
    "DecoderView",
    "Order",
    "Read",
    "Reading",
    "Repetition",
    "Rivals",
    "Slots",
    "Text",
    "Tokens",
]

EVERY = -1  # of a `Read`: every layer that the method acts on


@dataclass(frozen=True)
class Read:
    """One thing that a method reads, declared once for all budgets: only what is declared can be asked for.

    Attributes:
        where: "tower", "layer" (of the language model) or "prompt".
        at: in the tower how many blocks before the one whose features the projector reads, over blocks that see the
            whole image; in the language model the layer, or `EVERY`.
        what: "attention" (its queries and keys), in the tower also "key", "value" or "hidden" (states of its patches);
            of every layer that a cache method acts on "queries" (those of the prompt), "columns" (these, and the
            attention that each entry receives from all rows) or "again" (shares of attention in further forwards over
            the prompt); of the prompt "content", for vision methods "question", for prompt methods "loss".
    """

    where: str
    at: int
    what: str

    @property
    def every(self) -> bool:
        """Whether it is read in every layer that the method acts on."""
        return self.where == "layer" and self.at == EVERY


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

    def stays(self, tokens: int) -> Tensor:
        """(n, N) bool: which of the `tokens` N have an output of their own."""
        real = torch.ones_like(self.kept) if self.valid is None else self.valid.long()
        count = real.new_zeros(len(real), tokens).scatter_add(1, self.kept, real)  # one that fills up may be any
        return count.bool()

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


class Tokens(Protocol):
    """n sequences of N visual tokens that the language model would read, each ONE unit of decision.

    What that is says `VisionMethod.scope`: a crop, or all crops of an image, frames of a video, images of a sample,
    part behind part.
    """

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(h, w) of every part of a sequence, row-major, the same for all n; together they have N cells."""

    @property
    def grid(self) -> tuple[int, int]:
        """That of the only part: h * w == N."""

    @property
    def place(self) -> Tensor:
        """(n, N, 3) int64: of every token the number of its part, its row, its column.

        Parts are numbered as they stand in the prompt, frames in the order of time; of a crop alone it is the number in
        its image.
        """

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Where every part lies in its image: (top, left, bottom, right) as fractions of its sides.

        The image in small, where crops come with one, lies over all of it.

        Raises:
            ValueError: that is not known; a method whose `needs` name "places" is never asked then.
        """

    @property
    def image(self) -> Tensor:
        """(n, N) int64: the ordinal of the image (or video) of every token in its sample."""

    @property
    def content(self) -> Tensor:
        """(n,) int64, for methods that draw: a number for the pixels of each sequence and its place in the sample.

        The place is the ordinal of the image and of the crop in it, of all that a sequence holds. Neither the rest of
        the batch, nor padding, nor the device changes it. Features that were passed ready-made are told apart by a few
        coarse signs, which the rounding of another batch all but never turns.
        """

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    def __len__(self) -> int: ...

    @property
    def module(self) -> nn.Module | None:
        """What the method trains (`Method.module`), as it is now: looked up at every call, never to be held."""

    @property
    def losses(self) -> list[Tensor]:
        """Scalars appended here, by `make`, are added to the loss of this forward where labels are given."""

    @property
    def count(self) -> int:
        """N."""

    @property
    def embeddings(self) -> Tensor:
        """(n, N, D) visual tokens as the language model reads them (projector output)."""

    @property
    def features(self) -> Tensor:
        """(n, N, Dv) what the projector reads; where it joins patches into one token, their concatenation."""

    def attention(
        self, back: int = 0, *, rows: str = "cls", surrogate: str | None = None, logits: bool = False
    ) -> Tensor:
        """(n, H, N) fp32: attention on every token in one block of the tower, mean over the patches of a token.

        Softmax runs over all keys, the column of [CLS] is dropped behind it. Never an N x N map: "all" is streamed.

        Args:
            back: blocks before the one whose features the projector reads, over blocks that see the whole image.
            rows: the softmax row of "cls", of the "mean" query of the patches, or what "all" rows give on average.
            surrogate: which of the other two is meant on a tower without [CLS].
            logits: what the softmax is taken of; of "all", which is none, the logarithm.

        Raises:
            ValueError: the tower has no [CLS] and there is no `surrogate`, or `reads` has not declared the attention.
        """

    def states(self, what: str, back: int = 0) -> Tensor:
        """(n, N, d): states of the tokens in one block of the tower, mean over the patches of a token.

        Args:
            what: "key" or "value" (mean over the heads), or "hidden" (what the block gives).
            back: as of `attention`.

        Raises:
            ValueError: `reads` has not declared it.
        """

    @property
    def question(self) -> tuple[Tensor, Tensor]:
        """(n, T, D) embedded text of the sample behind each image, padded, and (n, T) bool, which of it is real.

        Rows with labels are no question. T can be 0.

        Raises:
            ValueError: `reads` has not declared it.
        """


class Text(Protocol):
    """The N tokens of one sample's prompt that may go, in their order; nothing generated, no answers to train on."""

    ids: Tensor  # (1, N) int64
    embeddings: Tensor  # (1, N, D)
    at: Tensor  # (1, N) int64, the rows at which they stand in the forward, padding counted
    length: int  # rows of the prompt, those that always stay included, padding not

    @property
    def module(self) -> nn.Module:
        """The module that the method trains, as it is now; see `Method.module`."""

    def attention(self, layer: int) -> Tensor:
        """(1, N) fp32: what the last row of the prompt attends to in a layer, mean over heads, nothing removed.

        A further forward up to that layer, over this turn's rows alone. `Read("layer", layer, "attention")`.
        """

    @property
    def loss(self) -> Tensor:
        """(1, N) fp32: -log p of each token after those before it, by the model itself, nothing removed.

        A further forward, over this turn's rows alone; 0 of a first token. `LOSS`.
        """


class Block(Protocol):
    """The tokens of n images inside the vision tower, after the attention of one block and before its MLP."""

    index: int  # block number, from 0
    steps: int  # number of blocks in which a method may act (those up to the feature block)
    has_cls: bool  # token 0 is [CLS]
    hidden: Tensor  # (n, m, D) hidden states, m tokens still present ([CLS] included)
    sizes: Tensor  # (n, m) float, how many original tokens each one stands for

    @property
    def keys(self) -> Tensor:
        """(n, m, d) head-mean keys of this block's attention."""


class DecoderView(Protocol):
    """The rows that enter one decoder layer; samples that are packed into one row of the batch are B of their own."""

    layer: int
    hidden: Tensor  # (B, S, D)
    valid: Tensor  # (B, S) bool, False on padding
    visual: Tensor  # (B, S) bool, True on visual tokens
    image: Tensor  # (B, S) int64, ordinal of the image in its sample, -1 on text
    memory: dict[str, Tensor]  # (B, S) or (B, S, ...) by name: lives through the forward, moves with the rows
    module: nn.Module | None  # what the method trains (`Method.module`), as it is now; for `gate`, never to be held
    losses: list[Tensor]  # scalars appended here, by `gate`, are added to the loss of this forward

    @property
    def prompt(self) -> Tensor:
        """(B, S) bool: rows of the prompt, neither padding nor generated nor answers to train on."""

    @property
    def first(self) -> Tensor:
        """(B, S) int64: how many rows of its sample came into the language model before each row."""

    @property
    def last(self) -> Tensor:
        """(B, S) int64: how many rows of the prompt came into the language model behind each row."""

    @property
    def removable(self) -> Tensor:
        """(B, S) bool: rows that may go, as `DecoderMethod.removable` says."""

    @property
    def speaks(self) -> Tensor:
        """(B, S) bool: rows that the answers are predicted from."""

    def attention(self, *, source: str, voters: Tensor | None = None) -> Tensor:
        """(B, S) fp32: what the voting rows attend to, mean over heads and voters (softmax over all visible keys).

        The voters are the last prompt row of each sample; in training every row that precedes an answer; or those that
        are True in `voters` (B, S). `source="own"` reads the layer just run, `source="next"` the queries and keys of
        the layer about to run. Samples are told apart, earlier turns are looked at too but not returned.
        """

    def received(self, weight: Tensor, *, source: str, sharpness: float = 1.0) -> Tensor:
        """(B, H, S) fp32: the attention that each row receives from all rows, summed with `weight` (B, 1 or H, S).

        One product of the rows with each other, in blocks, never S x S. Logits are multiplied by `sharpness` first.
        Rows of earlier turns are not looked at.
        """


class Order(Protocol):
    """The entries of one layer by nothing but their order, as one row finds them (or several, each in its own way).

    Tensors over slots are (B, 1, S), or (B, Hkv, S) once heads hold different entries; of several rows (B, 1 or Hkv,
    q, S), and what is (B, 1, 1) below is (B, 1, 1 or q, 1). A number stands for the same one in all rows and heads.
    """

    depth: int  # how many of the layers that the method acts on come before this one
    depths: int  # how many layers the method acts on
    valid: Tensor  # (B, 1 or Hkv, S) bool
    order: Tensor  # (B, 1 or Hkv, S) int64, rank of each valid entry among the valid entries of its row
    lengths: Tensor  # (B, 1 or Hkv, 1) int64, number of valid entries
    budget: Tensor  # (B, 1, 1) int64, entries each head may keep, incoming ones included
    incoming: int  # entries that arrive next and are kept anyway: 0 at the end of the prompt, 1 while decoding
    cursor: Tensor | int | None  # (B, 1, 1) int64, what `Holding.cursor` said last; None before


class Rivals(NamedTuple):
    """The entries of which one goes when a token comes to a full cache: one, or two neighbours by age."""

    first: int  # rank of the older one
    pair: bool = False
    cursor: int | None = None  # where the method goes on then


class CacheView(Order, Protocol):
    """The entries of one layer: keys and values, their order, and attention rows of the prompt on request.

    Tensors over slots are (B, 1, S), or (B, Hkv, S) once heads hold different entries.
    """

    layer: int
    layers: int
    shape: tuple[int, int, int]  # (B, Hkv, S)
    scores: Tensor | None  # (B, Hkv, S) fp32 running score, of methods that keep one
    votes: Tensor | None  # (B, Hkv, S) int64, how many rows it sums, of methods that count them

    def once(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, computed once for this layer and prompt: `score` and `merge` may share it."""

    @property
    def keys(self) -> Tensor:
        """(B, Hkv, S, d), as stored (rotated); while decoding asking may cost a copy."""

    @property
    def values(self) -> Tensor:
        """(B, Hkv, S, d), likewise."""

    @property
    def visual(self) -> Tensor:
        """(B, 1 or Hkv, S) bool, True on visual entries."""

    @property
    def content(self) -> Tensor:
        """(B,) int64, for methods that read it: a number for the ids of each prompt and the pixels of its images.

        Neither the rest of the batch nor padding changes it. Only at the end of the prompt.
        """

    @property
    def position(self) -> Tensor:
        """(B, 1 or Hkv, S) int64, where each entry stands in the caller's sequence, less what was removed before."""

    @property
    def queries(self) -> Tensor:
        """(B, Hq, S, d) rotated queries of the prompt. Only at the end of the prompt."""

    @property
    def scaling(self) -> float:
        """What the products of queries and keys are multiplied by. Only at the end of the prompt."""

    def unrotate(self, x: Tensor) -> Tensor:
        """(B, H, S, d) queries or keys of the prompt before their rotation. Only at the end of the prompt."""

    def rotate(self, x: Tensor) -> Tensor:
        """The reverse of `unrotate`."""

    @property
    def rotation(self) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """cos and sin (B or 1, S, d') of the prompt, and what turns (B, H, S, d) by them. Only at its end."""

    def future_rotation(self, count: int) -> Tensor:
        """(B or 1, d, d) fp32: mean rotation of the next `count` positions of text, `x @ it` turns vectors (..., d).

        Only at the end of the prompt.
        """

    def window_rows(self, rows: Tensor) -> Tensor:
        """(B, Hq, R, S) fp32 attention of the newest rows[b] rows of the prompt of sample b, zero where b has fewer."""

    def window_attention(self, rows: Tensor) -> Tensor:
        """(B, Hkv, S) fp32: attention that each entry receives from the newest rows[b] rows of the prompt of sample b.

        Summed over the rows, mean over the query heads of a group. Only at the end of the prompt.
        """

    def column_sums(self, *, normalize: bool = False, weight: Tensor | None = None) -> Tensor:
        """(B, Hkv, S) fp32: attention that each entry receives from all rows of the prompt, mean over a group.

        Rows count with `weight` (B, S), 1 by default. Divided by the weight of the rows that see the entry if
        `normalize`. Streamed in blocks of rows, never S x S. A method that reads `COLUMNS` gets those of all rows
        from the attention itself on a CPU; else it is a second pass over the attention of the prompt, which takes
        about as long as the first (half its products, all its exponentials). Rows without weight cost nothing. Only
        at the end of the prompt.
        """


class Slots(Protocol):
    """Rows of the caller, as a layer holds them; tensors are (B, S), or (B, Hkv, S) where heads hold different ones."""

    @property
    def index(self) -> Tensor:
        """int64, the caller's row behind each slot, earlier turns counted."""

    @property
    def image(self) -> Tensor:
        """int64, ordinal of the image in its sample, -1 on text."""

    @property
    def valid(self) -> Tensor:
        """bool, False on padding and on slots that only fill up."""


class Reading(Protocol):
    """One attention call of one layer, the rows that are fed among its entries (the newest)."""

    layer: int
    layers: int
    depth: int  # how many of the layers that the method acts on come before this one
    depths: int  # how many layers the method acts on
    queries: Tensor  # (B, Hq, q, d) rotated
    keys: Tensor  # (B, Hkv, S, d) rotated
    values: Tensor  # (B, Hkv, S, d')
    scaling: float
    memory: dict[str, Tensor]  # of this forward, from layer to layer
    side: dict[str, Tensor]  # of this layer: (B, Hkv, S) by name, which moves with the entries; new ones have zeros

    @property
    def visible(self) -> Tensor:
        """(B, 1 or Hkv, q, S) bool: what each row may see."""
