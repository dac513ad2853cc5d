"""What came of the last prompt, collected while a forward runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from hf_compress.engine.book import Book
from hf_compress.engine.encoded import Crop
from hf_compress.layout import Layout
from hf_compress.stores import HeldLayer, held_layers


@dataclass
class LastRun:
    """The last prompt: neither decode steps nor candidates of assisted decoding count as one.

    Printed it shows numbers per image and layer; lists of indices are left out.

    Attributes:
        prompt_tokens: per sample, valid tokens that the caller fed.
        earlier_tokens: rows that the cache had been fed before (an earlier turn).
        visual_kept: per sample, per image, the kept token indices of the image (list of int, ascending).
        visual_tokens: per sample, per image, how many visual tokens there were, newlines excluded.
        visual_left: per sample, per image, how many of them stay.
        visual_rows: per sample, per image, the rows of the caller that stand for it.
        visual_owners: per sample, per image, of each of these rows which of them it was merged into before the language
            model: its index, its own where it stays, -1 where it is gone.
        visual_crops: per sample, per image, its crops, as `compression.show` needs them.
        entered_entries: per decoder layer, slots that its cache held before (None: nothing).
        layer_tokens: per decoder layer and sample, valid rows that entered it.
        layer_index: per decoder layer and sample, the caller's rows behind them.
        cache_tokens: per decoder layer and sample, entries per KV head after the prompt, the mean where heads differ
            (None without a cache); 0 of layers without entries of their own (a state, not counted, or others').
        cache_bytes: per decoder layer, bytes that are stored for them, indices included (None without a cache).
        padding_bytes: per decoder layer, how many of these only fill up shorter rows and heads (None without a cache).
        attended: by decoder layer, of those whose attention was among some rows, how many per sample, mean over heads.
        read_bytes: by decoder layer, of those whose newest step read a part of the entries, the bytes of that part.
        full_cache_bytes: bytes of a cache that keeps everything, in layers with a sliding window what that reaches.
    """

    prompt_tokens: list[int]
    earlier_tokens: int = 0
    entered_entries: list[int] | None = None
    visual_kept: list[list[list[int]]] = field(default_factory=list, repr=False)
    visual_tokens: list[list[int]] = field(default_factory=list)
    visual_left: list[list[int]] = field(default_factory=list)
    visual_rows: list[list[list[int]]] = field(default_factory=list, repr=False)
    visual_owners: list[list[list[int]]] = field(default_factory=list, repr=False)
    visual_crops: list[list[list[Crop]]] = field(default_factory=list, repr=False, compare=False)  # of tensors
    layer_tokens: list[list[int]] = field(default_factory=list)
    layer_index: list[list[list[int]]] = field(default_factory=list, repr=False)
    cache_tokens: list[list[float]] | None = None
    cache_bytes: list[int] | None = None
    padding_bytes: list[int] | None = None
    full_cache_bytes: int | None = None
    attended: dict[int, list[float]] = field(default_factory=dict)
    read_bytes: dict[int, int] = field(default_factory=dict)


class Recorder:
    """Collects a `LastRun` while a forward runs; tensors become Python values only when somebody asks."""

    def __init__(self, found: Book | None, valid: Tensor, cache: Any = None):
        self._found, self._valid = found, valid
        self._before = None
        if cache is not None:
            self._before = [layer.held() if isinstance(layer, HeldLayer) else 0 for layer in cache.layers]
        self._past, self._full = 0, 0
        self._held: list[Any] = []
        self._cache: list[tuple[Any, int, Filled] | None] | None = None  # None: a layer has no entries of its own
        self._run: LastRun | None = None
        self.attended: dict[int, Tensor] = {}  # by layer, (B, h) rows of the prompt that took part in its attention
        self.read: dict[int, int] = {}  # by layer, bytes of the entries that attention read at the newest step

    def finish(self, held: list[Layout], past: int = 0, cache: Any = None) -> None:
        """The language model is done: the layout of every layer, what it had been fed `past`, and its cache."""
        self._held = held
        if cache is not None and all(layer.is_initialized for layer in held_layers(cache)):
            # (gradient checkpointing passes a cache by that came along)
            self._past = past
            self._cache = [
                (layer.layout, layer.nbytes(), Filled.of(layer)) if isinstance(layer, HeldLayer) else None
                for layer in cache.layers
            ]
            self._full = sum(_unevicted(layer) for layer in held_layers(cache))

    def run(self) -> LastRun:
        """The finished record."""
        if self._run is None:
            self._run = self._collect()
        self._run.read_bytes = dict(self.read)
        return self._run

    def entries(self, sample: int) -> list[list[list[int]] | None]:
        """Per decoder layer the caller's rows behind the entries that it stored after the prompt, of one sample.

        A list per KV head, or one where all heads store the same; None for layers without entries of their own.
        """
        out: list[list[list[int]] | None] = []
        for stored in self._cache or ():
            if stored is None:
                out.append(None)
                continue
            index, valid = stored[0].index[sample], stored[0].valid[sample]
            heads = zip(index, valid) if index.ndim > 1 else [(index, valid)]
            out.append([rows[real].tolist() for rows, real in heads])
        return out

    def visual(self, sample: int) -> list[int]:
        """The caller's rows of one sample that show images, as far as they are known: those that went are, where a
        method that reads images took them out."""
        found = {row for image in self.run().visual_rows[sample] for row in image}
        for layout in self._held[:1]:
            shown = layout.valid[sample] & (layout.image[sample] >= 0)
            found |= set(layout.index[sample][shown].tolist())
        return sorted(found)

    def _collect(self) -> LastRun:
        run = LastRun(self._valid.sum(1).tolist(), self._past, self._before if self._past else None)
        if self._found is None:  # no row shows an image
            run.visual_kept = [[] for _ in run.prompt_tokens]
            run.visual_tokens, run.visual_left = [[] for _ in run.prompt_tokens], [[] for _ in run.prompt_tokens]
            run.visual_rows, run.visual_crops = [[] for _ in run.prompt_tokens], [[] for _ in run.prompt_tokens]
            run.visual_owners = [[] for _ in run.prompt_tokens]
        else:
            run.visual_kept = [[k.tolist() for k in sample] for sample in self._found.kept()]
            run.visual_tokens, run.visual_left = self._found.tokens, self._found.left()
            run.visual_rows = [[rows.tolist() for rows in sample] for sample in self._found.rows()]
            run.visual_owners = [[rows.tolist() for rows in sample] for sample in self._found.owners()]
            run.visual_crops = self._found.crops
        run.attended = {layer: rows.float().mean(1).tolist() for layer, rows in self.attended.items()}
        seen: dict[int, Any] = {}
        for layout in self._held:
            if id(layout) not in seen:
                rows = [i[v].tolist() for i, v in zip(layout.index, layout.valid)]
                seen[id(layout)] = ([len(r) for r in rows], rows)
            run.layer_tokens.append(seen[id(layout)][0])
            run.layer_index.append(seen[id(layout)][1])
        if self._cache is not None:
            run.cache_tokens, run.cache_bytes, run.padding_bytes = [], [], []
            for stored in self._cache:
                if stored is None:
                    run.cache_tokens.append([0] * len(run.prompt_tokens))
                    run.cache_bytes.append(0)
                    run.padding_bytes.append(0)
                    continue
                layout, size, filled = stored
                counts = layout.valid.sum(-1)  # (B,), or (B, Hkv): the mean over heads
                counts = counts if counts.ndim == 1 else counts.float().mean(1)
                run.cache_tokens.append([int(n) if n == int(n) else n for n in counts.tolist()])
                run.cache_bytes.append(size)
                run.padding_bytes.append(filled.padding(layout))
            run.full_cache_bytes = self._full
        return run


class Filled(NamedTuple):
    """How the slots of one layer are stored after a prompt: bytes per slot and head, of the tail and of a body."""

    tail: int  # slots that are stored as they are, the newest ones
    heads: int
    size: int  # bytes of one of them, per head
    packed: int  # bytes of the body, where it holds a slot for every head and row

    @classmethod
    def of(cls, held: HeldLayer) -> Filled:
        keys, values = held.keys, held.values
        tight = held.body is None or held.body[0].tight
        packed = 0 if tight else sum(t.numel() * t.element_size() for part in held.body or () for t in part.tensors())
        size = (keys.shape[3] + values.shape[3]) * keys.element_size()
        return cls(keys.shape[2], keys.shape[1], size, packed)

    def padding(self, layout: Layout) -> int:
        """Bytes of slots that only fill up."""
        if layout.all_valid:
            return 0
        hidden = ~layout.valid
        old, new = hidden[..., : len(layout) - self.tail], hidden[..., len(layout) - self.tail :]
        each = self.size if layout.per_head else self.size * self.heads
        return int(new.sum()) * each + (round(self.packed * float(old.float().mean())) if old.numel() else 0)


def _unevicted(held: HeldLayer) -> int:
    """Bytes of a layer that keeps all keys and values, but for those that its window cannot reach any more."""
    rows, heads, _, size = held.keys.shape
    seen = held.get_seq_length()
    tokens = seen if held.window is None else min(seen, held.window - 1)
    return rows * heads * (size + held.values.shape[3]) * held.keys.element_size() * tokens
