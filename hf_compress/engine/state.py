"""What is alive during one forward or one generate; it belongs to the call and the thread, never to a module."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_compress.engine.encoded import Encoded
from hf_compress.engine.entries import StoredView
from hf_compress.engine.packing import Packing
from hf_compress.engine.passes import Pass
from hf_compress.engine.recorder import Recorder
from hf_compress.engine.reduction import Reduction
from hf_compress.layout import Layout
from hf_compress.patches.base import TowerCall
from hf_compress.tensors.attention import Record

IGNORED = -100  # the label of rows that are no answer


@dataclass
class Given:
    """What one forward was called with; settled before its first decoder layer runs.

    Attributes:
        inputs: what the caller passed, by name.
        ids: (B, q) token ids of this forward, or None.
        mask: (B, past + q) 2-D attention mask, or None.
        size: (B, q).
        past: rows the caller fed before.
        cache: the KV cache, None without one.
        positions: the position ids that the language model was handed (None: consecutive ones).
        ready_made: the language model was handed 4-D masks (image blocks that see both ways, or the caller's own).
        packing: which rows belong together where several samples are packed into one row; None: a sample per row.
        prompt_rows: length of the prompt while generate() runs, or where a training step says it without labels; rows
            behind it are answers.
        untold: nothing says where the answers of a training step begin; the name of the compression, for messages.
        tentative: rows of this forward may be taken back (candidates of assisted decoding).
        chunked: generate() feeds its prompt in chunks: one of a single row is no step.
        reread: the further forward over a prompt that this one is.
        bare: it goes as in a bare model, but that layers may be read.
    """

    inputs: dict[str, Any]
    ids: Tensor | None = None
    mask: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    past: int = 0
    cache: Any = None
    positions: Tensor | None = None
    ready_made: bool = False
    packing: Packing | None = None
    prompt_rows: int | None = None
    untold: str | None = None
    tentative: bool = False
    chunked: bool = False
    reread: Pass | None = None
    bare: bool = False

    @property
    def of_prompt(self) -> bool:
        """Whether its rows are given: a whole prompt or a part of it, neither a step nor candidates to be checked."""
        first, generated = not self.past, self.prompt_rows is not None and self.past >= self.prompt_rows
        return first or ((self.size[1] > 1 or self.chunked) and not generated)

    @property
    def lasting(self) -> bool:
        """Whether none of its rows will be taken back: no candidates stand behind the prompt."""
        return self.of_prompt and (self.prompt_rows is None or self.past + self.size[1] <= self.prompt_rows)

    def check_told(self) -> None:
        """Called before anybody looks at the prompt to decide what of it stays.

        Raises:
            ValueError: a training step does not say where the prompt ends, and what answers it must not be asked.
        """
        if self.untold is not None:
            raise ValueError(
                f"labels=None: {self.untold} decides by the prompt, and this forward in training mode does not say "
                "where it ends, so that what answers it would decide too; pass labels (-100 on the prompt), or "
                "logits_to_keep: 1 + the number of answer tokens at the end of all rows, 1 where there are none. "
                "(Trainer takes labels out for label_smoothing_factor and compute_loss_func.)"
            )

    def per_sample(self, rows: Tensor, layout: Layout) -> list[int]:
        """How many rows of every sample, among those of a layer, are True in `rows` (B, S)."""
        if self.packing is None:
            return rows.sum(1).tolist()
        return self.packing.per_sample(rows, layout.index - self.past)

    def next_position(self) -> Tensor:
        """(B or 1,) int64: the position of the first token after this forward, on M-RoPE on all axes."""
        positions = self.positions
        if positions is None:
            return torch.full((1,), self.past + self.size[1])
        if positions.ndim == 3:  # M-RoPE, behind plain positions where there are four
            positions = positions[-3:].amax(0)
        return positions.amax(-1) + 1


@dataclass
class Rows:
    """Which rows of a forward are alive at the layer that it has come to.

    Attributes:
        layout: rows alive in the current layer.
        entered: rows that entered the first layer.
        local: (B, S) `layout` as indices into this forward's q rows.
        moved: rows do not stand where the caller fed them: some are gone, or a ragged batch was lined up at the right.
        cut: (B, S) the same as indices into what the language model computed once for all layers (masks, rotary
            tables), None while no layer dropped anything.
        held: layout of every layer, in order.
    """

    layout: Layout = None  # type: ignore[assignment]
    entered: Layout = None  # type: ignore[assignment]
    local: Tensor = None  # type: ignore[assignment]
    moved: bool = False
    cut: Tensor | None = None
    held: list[Layout] = field(default_factory=list)


@dataclass
class Notes:
    """What the hooks of one forward tell each other.

    Attributes:
        plan: {layer: rows kept per sample, of those that may go} of the decoder stage; None: decided there.
        left: rows that may go, per sample, with which the plan was made.
        budget: of these, how many are to go through all layers together.
        embeds: what entered the language model and its layout, where the prompt will be fed again.
        settled: decoder layers whose entries a cache method has dealt with at the end of the prompt.
        views: of those whose group is not complete.
        wanted: decoder layers whose queries and keys somebody will read, and `records` what they left.
        changing: decoder layers of which somebody reads how they change rows, and `changes` what they left, since rows
            last left.
        received: what entries of a layer received, where a method's own attention gave it (`CachePolicy.attend`).
        read: what a reader remembers from layer to layer, by name.
        recorder: collects what the report tells of a prompt.
        content: (B,) int64 that stands for what the rows of the prompt hold, of methods that draw.
        owner: of every row the column of the one that it was merged into, see `Placement`.
        memory: what a decoder method remembers of each row alive, (B, S) or (B, S, ...) by name.
        picking: views of layers in whose attention a decoder method will be asked which rows take part.
        idle: decoder layers that no row of this forward goes through.
        waiting: rows that a layer is run without, by layer (`seams.Waiting`).
        passing: visual rows that only what stays of their image sees (`passing.Passing`); None: there are none.
        losses: scalars with gradient that are added to the loss of this forward, if it computes one.
        memo: masks and rotary rows by layout, images by modality.
    """

    plan: dict[int, list[int] | None] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)
    budget: list[int] = field(default_factory=list)
    embeds: tuple[Tensor, Layout] | None = None
    settled: set[int] = field(default_factory=set)
    views: dict[int, StoredView] = field(default_factory=dict)
    wanted: frozenset[int] = frozenset()
    records: dict[int, Record] = field(default_factory=dict)
    changing: frozenset[int] = frozenset()
    changes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    received: dict[int, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    recorder: Recorder | None = None
    content: Tensor | None = None
    owner: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    picking: dict[int, Any] = field(default_factory=dict)
    idle: Collection[int] = ()
    waiting: dict[int, Any] = field(default_factory=dict)
    passing: Any = None
    losses: list[Tensor] = field(default_factory=list)
    memo: dict[Any, Any] = field(default_factory=dict)


@dataclass
class Forward:
    """One forward of the compressed model, from its outermost call to the exit of its language model."""

    given: Given
    rows: Rows = field(default_factory=Rows)
    notes: Notes = field(default_factory=Notes)


@dataclass
class Drafting:
    """Decoding by drafts that the uncompressed model checks.

    Attributes:
        tokens: how many are drafted at most before they are checked.
        drafted, accepted: tokens so far; what the checks add of their own is counted in neither.
        forwards: of the uncompressed model.
    """

    tokens: int
    drafted: int = 0
    accepted: int = 0
    forwards: int = 0


@dataclass
class Contrasting:
    """Decoding against what the compressed model says: (1 + alpha) * l - alpha * l', see `contrast.contrast`."""

    alpha: float
    beta: float


@dataclass
class Run:
    """One generate() of the compressed model.

    Attributes:
        rows: length of its prompt, None where it was given no ids.
        chunked: its input_ids, where the prompt is fed in chunks; `mask`: its attention mask.
        bare: its forwards go as in a bare model: its prompt was shortened already, or it checks drafts.
        tentative: what it feeds may be taken back.
        draft: it proposes candidates to another generate().
        encoded: what was encoded for it, from its first forward on.
        recorder: of a prompt that was shortened, until it has been fed.
        drafting: what counts the drafts that it checks.
        negative: the processor of logits that wants to know what its forwards are called with (`contrast.Negative`).
    """

    rows: int | None = None
    chunked: Tensor | None = None
    mask: Tensor | None = None
    bare: bool = False
    tentative: bool = False
    draft: bool = False
    encoded: dict[str, Encoded] | None = None
    recorder: Recorder | None = None
    drafting: Drafting | None = None
    negative: Any = None


class State(threading.local):
    """Per-thread state of one compression; copies and pickles of a model start with an empty one."""

    forward: Forward | None = None  # the forward that is running
    call: TowerCall | None = None  # the run of the vision tower that is going on
    encoded: dict[str, Encoded]  # the newest images and videos that were encoded
    reduction: Reduction | None = None  # tokens still present inside the vision tower
    run: Run | None = None  # the generate() that is running; inside a forward, the one that it belongs to
    prepared: Run | None = None  # the generate() to which the next forward belongs
    off: bool = False  # the forward that is running goes as if there were no compression, inside the tower too
    beside: Drafting | Contrasting | None = None  # generate() is that of the uncompressed model, and what for

    def __init__(self) -> None:
        self.encoded = {}

    @property
    def bypass(self) -> bool:
        """Whether the forward that is running is to go as in a bare model."""
        return self.off or (self.run is not None and self.run.bare)

    @property
    def chunked(self) -> Tensor | None:
        """input_ids of the generate() whose prompt is being fed in chunks."""
        return None if self.run is None else self.run.chunked

    @property
    def mask(self) -> Tensor | None:
        """attention_mask of the generate() that is running."""
        return None if self.run is None else self.run.mask

    @contextlib.contextmanager
    def scope(self) -> Iterator[State]:
        """A call inside leaves behind what it found, whatever ends it; what it encodes is its own."""
        found = dict(vars(self))
        self.encoded = dict(self.encoded)
        try:
            yield self
        finally:
            vars(self).clear()
            vars(self).update(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return State()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return State, ()
