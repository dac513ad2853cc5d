"""What was asked for and what came of it: tokens, FLOPs and KV bytes, per layer."""

from __future__ import annotations

import html
from typing import Any

from torch import Tensor, nn

from hf_compress.engine.context import Context
from hf_compress.engine.recorder import LastRun


def layer_flops(
    config: Any, tokens: int, before: int = 0, *, attends: bool = True, among: float | None = None
) -> float:
    """FLOPs of one decoder layer over a causal prompt of so many tokens (two per multiply-add, gated MLP).

    Every token also attends to the entries that the cache held `before`, unless the layer keeps a state: it is then
    taken to be as wide as one that `attends`. Where attention is `among` fewer of the tokens, they alone count there.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    projections = 4 * tokens * hidden * size * (heads + kv)
    looks = tokens if among is None else among
    attention = 2 * looks * (looks + 1 + 2 * before) * heads * size if attends else 0
    return projections + attention + 6 * tokens * hidden * _mlp_width(config)


def _mlp_width(config: Any) -> int:
    """Of an MLP, or of the experts that a token goes through where there is nothing else."""
    if (dense := getattr(config, "intermediate_size", None)) is not None:
        return dense
    shared = getattr(config, "shared_expert_intermediate_size", 0)
    return config.moe_intermediate_size * config.num_experts_per_tok + shared


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

    def __init__(self, title: str, context: Context):
        self._title, self._context = title, context

    def rows(self) -> list[dict[str, Any]]:
        """One dict per decoder layer: tokens that enter (mean over samples), cache entries, KV bytes, GFLOPs.

        Where the attention of layers is among some tokens, their number (mean over heads) is told too. Layers that keep
        a state have no entries, and their state is in no sum of bytes.
        """
        run, config = self._run(), self._context.decoder.config
        out, attends = [], self._attends()
        for i, tokens in enumerate(run.layer_tokens):
            row: dict[str, Any] = {"layer": i, "tokens": sum(tokens) / len(tokens)}
            before = 0 if run.entered_entries is None else run.entered_entries[i]
            among: list[Any] = run.attended.get(i) or [None] * len(tokens)
            each = (layer_flops(config, n, before, attends=attends[i], among=m) for n, m in zip(tokens, among))
            row["gflops"] = sum(each) / 1e9
            if run.attended:
                row["attended"] = sum(run.attended.get(i, tokens)) / len(tokens)
            if run.cache_tokens is not None and run.cache_bytes is not None:
                row["cache_entries"] = sum(run.cache_tokens[i]) / len(tokens)
                row["kv_bytes"] = run.cache_bytes[i]
                if run.read_bytes:
                    row["read_bytes"] = run.read_bytes.get(i, run.cache_bytes[i])
            out.append(row)
        return out

    def totals(self) -> dict[str, Any]:
        """Requested and realised: visual tokens before and after, prefill FLOPs and KV bytes against uncompressed.

        `prompt_tokens` are those of the last prompt; bytes are those of the whole cache, `earlier_tokens` per row of
        turns before included. `padding_bytes` of `kv_bytes` only bring shorter rows of a batch to the length of the
        longest. `read_bytes`, of methods that read a part of the entries, are what the attention of the newest step
        has read, without what the choice itself reads. `weight_bytes` are the weights as stored, which no compression
        of tokens changes. `decode_share` is the part of a decode step that the uncompressed cache can account for: a
        step reads the weights of the language model once and the cache of the whole batch, and little else takes time.
        No cache method can save more of it.
        """
        run, rows = self._run(), self.rows()
        config = self._context.decoder.config
        every = [(n, attends) for attends in self._attends() for n in run.prompt_tokens]
        full = sum(layer_flops(config, n, run.earlier_tokens, attends=attends) for n, attends in every) / 1e9
        out: dict[str, Any] = {
            "requested": self._context.name,
            "visual_tokens": sum(map(sum, run.visual_tokens)),
            "visual_kept": sum(map(sum, run.visual_left)),
            "prompt_tokens": sum(run.prompt_tokens),
            "earlier_tokens": run.earlier_tokens,
            "layer_tokens": sum(sum(t) for t in run.layer_tokens) / max(1, len(run.layer_tokens)),
            "gflops": sum(r["gflops"] for r in rows),
            "full_gflops": full,
            "weight_bytes": weight_bytes(self._context.model),
        }
        if run.cache_bytes is not None and run.full_cache_bytes is not None:
            out["kv_bytes"], out["full_kv_bytes"] = sum(run.cache_bytes), run.full_cache_bytes
            out["padding_bytes"] = sum(run.padding_bytes or ())
            read = run.full_cache_bytes / (weight_bytes(self._context.decoder) + run.full_cache_bytes)
            out["decode_share"] = read
            if run.read_bytes:
                out["read_bytes"] = sum(row["read_bytes"] for row in rows)
        return out

    def _attends(self) -> list[bool]:
        """Of every decoder layer, whether it attends; others keep a state."""
        states = self._context.adapter.states
        kinds = self._context.decoder.config.layer_types if states else [None] * len(self._context.layers)
        return [kind not in states for kind in kinds]

    def _run(self) -> LastRun:
        if self._context.recorder is None:
            raise RuntimeError("nothing to report yet: call the model (or generate) first")
        return self._context.recorder.run()

    def _lines(self) -> list[str]:
        """The summary, one statement a line."""
        t = self.totals()
        lines = []
        if t["visual_tokens"]:
            removed = 1 - t["visual_kept"] / t["visual_tokens"]
            passes = (method := self._context.vision_method) is not None and method.passes
            where = "behind the prompt" if passes else "before layer 0"
            lines.append(f"visual tokens: {t['visual_tokens']} -> {t['visual_kept']} ({removed:.1%} removed {where})")
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
            if "read_bytes" in t:
                part = t["read_bytes"] / t["kv_bytes"]
                lines.append(f"the newest step read {t['read_bytes']:,} bytes of the KV cache ({part:.1%})")
            lines.append(f"decoding: the whole cache is {t['decode_share']:.1%} of what a step of this batch reads")
        return lines

    def _table(self) -> list[list[str]]:
        """Titles, then the numbers of every layer."""
        rows = self.rows()
        known = ("layer", "tokens", "attended", "cache_entries", "kv_bytes", "gflops")
        titles: list[str] = [k for k in known if k in rows[0]]
        return [titles, *([_number(r[k], 3 if k == "gflops" else 1) for k in titles] for r in rows)]

    def __str__(self) -> str:
        head = self._title
        if self._context.recorder is None:
            return f"{head}\nnot called yet"
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join(x.rjust(w) for x, w in zip(line, widths)) for line in table]
        return "\n".join([head, *self._lines(), *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        head = f"<b>{html.escape(self._title)}</b>"
        if self._context.recorder is None:
            return f"{head}<br>not called yet"
        lines = "<br>".join(map(html.escape, self._lines()))
        titles, *rows = self._table()
        body = "".join("<tr>" + "".join(f"<td>{x}</td>" for x in row) + "</tr>" for row in rows)
        top = "".join(f"<th>{html.escape(x)}</th>" for x in titles)
        return f"{head}<br>{lines}<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _number(x: float, decimals: int) -> str:
    """Whole numbers without decimals."""
    return f"{x:,.0f}" if x == int(x) else f"{x:,.{decimals}f}"
