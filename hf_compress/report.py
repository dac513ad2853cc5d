"""What was asked for and what came of it: tokens, FLOPs and KV bytes, per layer."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from hf_compress.stores import HeldLayer, Ragged
from hf_compress.stores.packed import Tight

if TYPE_CHECKING:
    from hf_compress.engine.prompt import Book
    from hf_compress.engine.runtime import Compression
    from hf_compress.engine.state import Forward
    from hf_compress.engine.vision import Crop
    from hf_compress.layout import Layout


@dataclass
class LastRun:
    """The last prompt: neither decode steps nor candidates of assisted decoding count as one.

    Attributes:
        prompt_tokens: per sample, valid tokens that the caller fed.
        earlier_tokens: rows that the cache had been fed before (an earlier turn).
        visual_kept: per sample, per image, the kept token indices of the image (list of int, ascending).
        visual_tokens: per sample, per image, how many visual tokens there were, newlines excluded.
        visual_left: per sample, per image, how many of them stay.
        visual_rows: per sample, per image, the rows of the caller that stand for it.
        visual_crops: per sample, per image, its crops, as `compression.show` needs them.
        entered_entries: per decoder layer, slots that its cache held before (None: nothing).
        layer_tokens: per decoder layer and sample, valid rows that entered it.
        layer_index: per decoder layer and sample, the caller's rows behind them.
        cache_tokens: per decoder layer and sample, entries per KV head after the prompt, the mean where heads differ
            (None without a cache).
        cache_bytes: per decoder layer, bytes that are stored for them, indices included (None without a cache).
        padding_bytes: per decoder layer, how many of these only fill up shorter rows and heads (None without a cache).
        full_cache_bytes: bytes of a cache that keeps everything, in layers with a sliding window what that reaches.
    """

    prompt_tokens: list[int]
    earlier_tokens: int = 0
    entered_entries: list[int] | None = None
    visual_kept: list[list[list[int]]] = field(default_factory=list)
    visual_tokens: list[list[int]] = field(default_factory=list)
    visual_left: list[list[int]] = field(default_factory=list)
    visual_rows: list[list[list[int]]] = field(default_factory=list)
    visual_crops: list[list[list[Crop]]] = field(default_factory=list, compare=False)  # of tensors
    layer_tokens: list[list[int]] = field(default_factory=list)
    layer_index: list[list[list[int]]] = field(default_factory=list)
    cache_tokens: list[list[float]] | None = None
    cache_bytes: list[int] | None = None
    padding_bytes: list[int] | None = None
    full_cache_bytes: int | None = None


class Recorder:
    """Collects a `LastRun` while a forward runs; tensors become Python values only when somebody asks."""

    def __init__(self, found: Book | None, valid: Tensor, layers: int, cache: Any = None):
        self._found, self._valid, self._layers = found, valid, layers
        self._before = [layer.held() for layer in cache.layers] if cache is not None else None
        self._past, self._full = 0, 0
        self._held: list[Any] = []
        self._cache: list[tuple[Layout, int, Filled]] | None = None
        self._run: LastRun | None = None

    def finish(self, now: Forward) -> None:
        """The language model is done."""
        self._held = now.held or [now.layout] * self._layers
        if now.cache is not None and all(layer.is_initialized for layer in now.cache.layers):
            # (gradient checkpointing passes a cache by that came along)
            self._past = now.past
            self._cache = [(layer.layout, layer.nbytes(), Filled.of(layer)) for layer in now.cache.layers]
            self._full = sum(_unevicted(layer) for layer in now.cache.layers)

    def run(self) -> LastRun:
        """The finished record."""
        if self._run is None:
            self._run = self._collect()
        return self._run

    def _collect(self) -> LastRun:
        run = LastRun(self._valid.sum(1).tolist(), self._past, self._before if self._past else None)
        if self._found is None:  # no row shows an image
            run.visual_kept = [[] for _ in run.prompt_tokens]
            run.visual_tokens, run.visual_left = [[] for _ in run.prompt_tokens], [[] for _ in run.prompt_tokens]
            run.visual_rows, run.visual_crops = [[] for _ in run.prompt_tokens], [[] for _ in run.prompt_tokens]
        else:
            run.visual_kept = [[k.tolist() for k in sample] for sample in self._found.kept()]
            run.visual_tokens, run.visual_left = self._found.tokens, self._found.left()
            run.visual_rows = [[rows.tolist() for rows in sample] for sample in self._found.rows()]
            run.visual_crops = self._found.crops
        seen: dict[int, Any] = {}
        for layout in self._held:
            if id(layout) not in seen:
                rows = [i[v].tolist() for i, v in zip(layout.index, layout.valid)]
                seen[id(layout)] = ([len(r) for r in rows], rows)
            run.layer_tokens.append(seen[id(layout)][0])
            run.layer_index.append(seen[id(layout)][1])
        if self._cache is not None:
            run.cache_tokens, run.cache_bytes, run.padding_bytes = [], [], []
            for layout, size, filled in self._cache:
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
        tight = held.body is None or isinstance(held.body[0], (Ragged, Tight))
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


def layer_flops(config: Any, tokens: int, before: int = 0) -> float:
    """FLOPs of one decoder layer over a causal prompt of so many tokens (two per multiply-add, gated MLP).

    Every token also attends to the entries that the cache held `before`.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    projections = 4 * tokens * hidden * size * (heads + kv)
    attention = 2 * tokens * (tokens + 1 + 2 * before) * heads * size
    return projections + attention + 6 * tokens * hidden * config.intermediate_size


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers as stored: shared ones once, quantized ones packed, with their scales."""
    stored = [*model.parameters(), *model.buffers(), *(t for m in model.modules() for t in _scales(m))]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in stored}.values())


def _scales(module: nn.Module) -> list[Tensor]:
    """What bitsandbytes keeps beside a quantized weight; `state_dict()` has it too, but repacks and rounds."""
    weight, int8 = getattr(module, "weight", None), getattr(module, "state", None)
    if (int4 := getattr(weight, "quant_state", None)) is not None:
        return [t for t in int4.as_dict().values() if isinstance(t, Tensor)]
    return [t for t in (getattr(weight, "SCB", None), getattr(int8, "SCB", None)) if t is not None]


class Report:
    """Printable; `rows()` gives the per-layer numbers, `totals()` the summary."""

    def __init__(self, compression: Compression):
        self._compression = compression

    def rows(self) -> list[dict[str, Any]]:
        """One dict per decoder layer: tokens that enter (mean over samples), cache entries, KV bytes, GFLOPs."""
        run, config = self._run(), self._compression.decoder.config
        out = []
        for i, tokens in enumerate(run.layer_tokens):
            row: dict[str, Any] = {"layer": i, "tokens": sum(tokens) / len(tokens)}
            before = 0 if run.entered_entries is None else run.entered_entries[i]
            row["gflops"] = sum(layer_flops(config, n, before) for n in tokens) / 1e9
            if run.cache_tokens is not None and run.cache_bytes is not None:
                row["cache_entries"] = sum(run.cache_tokens[i]) / len(tokens)
                row["kv_bytes"] = run.cache_bytes[i]
            out.append(row)
        return out

    def totals(self) -> dict[str, Any]:
        """Requested and realised: visual tokens before and after, prefill FLOPs and KV bytes against uncompressed.

        `prompt_tokens` are those of the last prompt; bytes are those of the whole cache, `earlier_tokens` per row of
        turns before included. `padding_bytes` of `kv_bytes` only bring shorter rows of a batch to the length of the
        longest. `weight_bytes` are the weights as stored, which no compression of tokens changes. `decode_share` is
        the part of a decode step that the uncompressed cache can account for: a step reads the weights of the language
        model once and the cache of the whole batch, and little else takes time. No cache method can save more of it.
        """
        run, rows = self._run(), self.rows()
        config = self._compression.decoder.config
        full = len(rows) * sum(layer_flops(config, n, run.earlier_tokens) for n in run.prompt_tokens) / 1e9
        out: dict[str, Any] = {
            "requested": self._compression.config.summary(),
            "visual_tokens": sum(map(sum, run.visual_tokens)),
            "visual_kept": sum(map(sum, run.visual_left)),
            "prompt_tokens": sum(run.prompt_tokens),
            "earlier_tokens": run.earlier_tokens,
            "layer_tokens": sum(sum(t) for t in run.layer_tokens) / max(1, len(run.layer_tokens)),
            "gflops": sum(r["gflops"] for r in rows),
            "full_gflops": full,
            "weight_bytes": weight_bytes(self._compression.model),
        }
        if run.cache_bytes is not None and run.full_cache_bytes is not None:
            out["kv_bytes"], out["full_kv_bytes"] = sum(run.cache_bytes), run.full_cache_bytes
            out["padding_bytes"] = sum(run.padding_bytes or ())
            read = run.full_cache_bytes / (weight_bytes(self._compression.decoder) + run.full_cache_bytes)
            out["decode_share"] = read
        return out

    def _run(self) -> LastRun:
        run = self._compression.last
        if run is None:
            raise RuntimeError("nothing to report yet: call the model (or generate) first")
        return run

    def _lines(self) -> list[str]:
        """The summary, one statement a line."""
        t = self.totals()
        lines = []
        if t["visual_tokens"]:
            removed = 1 - t["visual_kept"] / t["visual_tokens"]
            lines.append(
                f"visual tokens: {t['visual_tokens']} -> {t['visual_kept']} ({removed:.1%} removed before layer 0)"
            )
        turn = f" (after {t['earlier_tokens']} of earlier turns)" if t["earlier_tokens"] else ""
        lines.append(f"tokens per layer (mean): {t['prompt_tokens']} -> {t['layer_tokens']:.1f}{turn}")
        lines.append(
            f"prefill: {t['full_gflops']:.3f} -> {t['gflops']:.3f} GFLOPs ({t['gflops'] / t['full_gflops']:.1%})"
        )
        lines.append(f"weights: {t['weight_bytes']:,} bytes as stored")
        if "kv_bytes" in t:
            share = t["kv_bytes"] / t["full_kv_bytes"]
            lines.append(f"KV cache after the prompt: {t['full_kv_bytes']:,} -> {t['kv_bytes']:,} bytes ({share:.1%})")
            if t["padding_bytes"]:
                lines.append(f"of these {t['padding_bytes']:,} bytes only fill up shorter rows of the batch")
            lines.append(f"decoding: the whole cache is {t['decode_share']:.1%} of what a step of this batch reads")
        return lines

    def _table(self) -> list[list[str]]:
        """Titles, then the numbers of every layer."""
        rows = self.rows()
        titles: list[str] = [k for k in ("layer", "tokens", "cache_entries", "kv_bytes", "gflops") if k in rows[0]]
        return [titles, *([_number(r[k], 3 if k == "gflops" else 1) for k in titles] for r in rows)]

    def __str__(self) -> str:
        head = repr(self._compression)
        if self._compression.last is None:
            return f"{head}\nnot called yet"
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join(x.rjust(w) for x, w in zip(line, widths)) for line in table]
        return "\n".join([head, *self._lines(), *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        head = f"<b>{html.escape(repr(self._compression))}</b>"
        if self._compression.last is None:
            return f"{head}<br>not called yet"
        lines = "<br>".join(map(html.escape, self._lines()))
        titles, *rows = self._table()
        body = "".join("<tr>" + "".join(f"<td>{x}</td>" for x in row) + "</tr>" for row in rows)
        top = "".join(f"<th>{html.escape(x)}</th>" for x in titles)
        return f"{head}<br>{lines}<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _number(x: float, decimals: int) -> str:
    """Whole numbers without decimals."""
    return f"{x:,.0f}" if x == int(x) else f"{x:,.{decimals}f}"
