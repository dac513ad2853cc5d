"""What was asked for and what came of it: tokens, FLOPs and KV bytes, per layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_compress.engine.prompt import Book
    from hf_compress.engine.runtime import Compression
    from hf_compress.engine.state import Forward
    from hf_compress.engine.vision import Crop


@dataclass
class LastRun:
    """The last prompt (any forward of more than one row).

    Attributes:
        prompt_tokens: per sample, valid tokens that the caller fed.
        visual_kept: per sample, per image, the kept token indices of the image (list of int, ascending).
        visual_tokens: per sample, per image, how many visual tokens there were, newlines excluded.
        visual_left: per sample, per image, how many of them stay.
        visual_rows: per sample, per image, the rows of the caller that stand for it.
        visual_crops: per sample, per image, its crops, as `compression.show` needs them.
        layer_tokens: per decoder layer and sample, valid rows that entered it.
        layer_index: per decoder layer and sample, the caller's rows behind them.
        cache_tokens: per decoder layer and sample, entries per KV head after the prompt, the mean where heads differ
            (None without a cache).
        cache_bytes: per decoder layer, bytes that are stored for them, indices included (None without a cache).
    """

    prompt_tokens: list[int]
    visual_kept: list[list[list[int]]] = field(default_factory=list)
    visual_tokens: list[list[int]] = field(default_factory=list)
    visual_left: list[list[int]] = field(default_factory=list)
    visual_rows: list[list[list[int]]] = field(default_factory=list)
    visual_crops: list[list[list[Crop]]] = field(default_factory=list, compare=False)  # of tensors
    layer_tokens: list[list[int]] = field(default_factory=list)
    layer_index: list[list[list[int]]] = field(default_factory=list)
    cache_tokens: list[list[float]] | None = None
    cache_bytes: list[int] | None = None
    full_cache_bytes: int | None = None


class Recorder:
    """Collects a `LastRun` while a forward runs; tensors become Python values only when somebody asks."""

    def __init__(self, found: Book | None, valid: Tensor, layers: int):
        self._found, self._valid, self._layers = found, valid, layers
        self._held: list[Any] = []
        self._cache: list[Any] | None = None
        self._run: LastRun | None = None

    def finish(self, now: Forward) -> None:
        """The language model is done."""
        self._held = now.held or [now.layout] * self._layers
        if now.cache is not None and all(layer.is_initialized for layer in now.cache.layers):
            # (gradient checkpointing passes a cache by that came along)
            self._cache = [(layer.layout, layer.nbytes()) for layer in now.cache.layers]
            keys = now.cache.layers[0].keys
            self._full = 2 * keys.shape[0] * keys.shape[1] * keys.shape[3] * keys.element_size() * len(self._cache)

    def run(self) -> LastRun:
        """The finished record."""
        if self._run is None:
            self._run = self._collect()
        return self._run

    def _collect(self) -> LastRun:
        run = LastRun(self._valid.sum(1).tolist())
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
            run.cache_tokens = []
            run.cache_bytes = []
            for layout, size in self._cache:
                counts = layout.valid.sum(-1)  # (B,), or (B, Hkv): the mean over heads
                counts = counts if counts.ndim == 1 else counts.float().mean(1)
                run.cache_tokens.append([int(n) if n == int(n) else n for n in counts.tolist()])
                run.cache_bytes.append(size)
            run.full_cache_bytes = self._full * self._cache[0][0].seen
        return run


def layer_flops(config: Any, tokens: int) -> float:
    """FLOPs of one decoder layer over a causal prompt of so many tokens (two per multiply-add, gated MLP)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    projections = 4 * tokens * hidden * size * (heads + kv)
    return projections + 2 * tokens * (tokens + 1) * heads * size + 6 * tokens * hidden * config.intermediate_size


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
            row["gflops"] = sum(layer_flops(config, n) for n in tokens) / 1e9
            if run.cache_tokens is not None and run.cache_bytes is not None:
                row["cache_entries"] = sum(run.cache_tokens[i]) / len(tokens)
                row["kv_bytes"] = run.cache_bytes[i]
            out.append(row)
        return out

    def totals(self) -> dict[str, Any]:
        """Requested and realised: visual tokens before and after, prefill FLOPs and KV bytes against uncompressed.

        `weight_bytes` are the weights as stored, which no compression of tokens changes. `decode_share` is the part
        of a decode step that the uncompressed cache can account for: a step reads the weights of the language model
        once and the cache of the whole batch, and little else takes time. No cache method can save more of it.
        """
        run, rows = self._run(), self.rows()
        config = self._compression.decoder.config
        full = len(rows) * sum(layer_flops(config, n) for n in run.prompt_tokens) / 1e9
        out: dict[str, Any] = {
            "requested": self._compression.config.summary(),
            "visual_tokens": sum(map(sum, run.visual_tokens)),
            "visual_kept": sum(map(sum, run.visual_left)),
            "prompt_tokens": sum(run.prompt_tokens),
            "layer_tokens": sum(sum(t) for t in run.layer_tokens) / max(1, len(run.layer_tokens)),
            "gflops": sum(r["gflops"] for r in rows),
            "full_gflops": full,
            "weight_bytes": weight_bytes(self._compression.model),
        }
        if run.cache_bytes is not None and run.full_cache_bytes is not None:
            out["kv_bytes"], out["full_kv_bytes"] = sum(run.cache_bytes), run.full_cache_bytes
            read = run.full_cache_bytes / (weight_bytes(self._compression.decoder) + run.full_cache_bytes)
            out["decode_share"] = read
        return out

    def _run(self) -> LastRun:
        run = self._compression.last
        if run is None:
            raise RuntimeError("nothing to report yet: call the model (or generate) first")
        return run

    def __str__(self) -> str:
        name = type(self._compression.model).__name__
        head = f"{name} compressed by {self._compression.config.summary()}"
        if self._compression.last is None:
            return f"{head}\nnot called yet"
        t = self.totals()
        lines = [head]
        if t["visual_tokens"]:
            removed = 1 - t["visual_kept"] / t["visual_tokens"]
            lines.append(
                f"visual tokens: {t['visual_tokens']} -> {t['visual_kept']} ({removed:.1%} removed before layer 0)"
            )
        lines.append(f"tokens per layer (mean): {t['prompt_tokens']} -> {t['layer_tokens']:.1f}")
        lines.append(
            f"prefill: {t['full_gflops']:.3f} -> {t['gflops']:.3f} GFLOPs ({t['gflops'] / t['full_gflops']:.1%})"
        )
        lines.append(f"weights: {t['weight_bytes']:,} bytes as stored")
        if "kv_bytes" in t:
            share = t["kv_bytes"] / t["full_kv_bytes"]
            lines.append(f"KV cache after the prompt: {t['full_kv_bytes']:,} -> {t['kv_bytes']:,} bytes ({share:.1%})")
            lines.append(f"decoding: the whole cache is {t['decode_share']:.1%} of what a step of this batch reads")
        lines.append(self._table())
        return "\n".join(lines)

    def _table(self) -> str:
        rows = self.rows()
        titles: list[str] = [k for k in ("layer", "tokens", "cache_entries", "kv_bytes", "gflops") if k in rows[0]]
        shown = [[f"{r[k]:,.3f}" if k == "gflops" else f"{r[k]:,.10g}" for k in titles] for r in rows]
        widths = [max(len(x) for x in column) for column in zip(titles, *shown)]
        lines: list[list[str]] = [titles, *shown]
        return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, widths)) for line in lines)

    __repr__ = __str__
