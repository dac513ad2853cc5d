"""Decoding over a cache in a few bits on a CUDA device: fused kernel, unpacking, and the uncompressed cache.

    python benchmarks/kernel.py attention --json benchmarks/results/2026-01-31-kernel.json
    python benchmarks/kernel.py model --lengths 16384,65536
    python benchmarks/kernel.py plans

`attention` times one attention of one new token per row, in CUDA graphs, so that launching costs nobody anything, over
enough layers in turn that none is found in the L2 cache. `model` times whole decode steps of a LLaMA of random weights
as a caller sees them, Python included. `plans` tries cuts of the kernel (`hf_compress.kernels.decode.Plan`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import triton
import typer
from torch import Tensor

import hf_compress
from hf_compress import kernels
from hf_compress.bench.timing import record
from hf_compress.kernels.decode import Plan, attend
from hf_compress.stores.packed import Packed

DEVICE = "cuda"
HEADS, SHARE, SIZE, TAIL, GROUP = 8, 4, 128, 48, 32  # KV heads, query heads of each, channels, unpacked tokens
COLD = 2**28  # bytes that are read before any is read again; several L2 caches

app = typer.Typer(add_completion=False, help=__doc__)
Json = Annotated[Path | None, typer.Option("--json", help="Add the run, with hardware and versions, to this file.")]


class Layer:
    """Keys and values of one layer: packed in `bits` with a dense tail, or dense (`bits` 16)."""

    def __init__(self, bits: int, B: int, L: int):
        shape = (B, HEADS, L, SIZE)
        self.tail = self.keys, self.values = tuple(
            torch.randn(shape if bits == 16 else (B, HEADS, TAIL, SIZE), device=DEVICE, dtype=torch.bfloat16)
            for _ in range(2)
        )
        if bits < 16:
            x = torch.randn(1, HEADS, L - TAIL, SIZE, device=DEVICE, dtype=torch.bfloat16)  # the same in every row
            grouping = (GROUP, 1), (1, GROUP)
            packed = (Packed.of(x, bits, group).rows(torch.zeros(B, dtype=torch.int64)) for group in grouping)
            self.packed = tuple(packed)

    def nbytes(self) -> int:
        tensors = [*self.tail, *(t for part in getattr(self, "packed", ()) for t in part.tensors())]
        return sum(t.numel() * t.element_size() for t in tensors)


def native(query: Tensor, layer: Layer) -> Tensor:
    """What transformers runs over an uncompressed cache."""
    return F.scaled_dot_product_attention(query, layer.keys, layer.values, enable_gqa=True)


def grouped(query: Tensor, layer: Layer) -> Tensor:
    """The same with the query heads of a KV head as rows, which reads the cache once for all of them."""
    return F.scaled_dot_product_attention(query.unflatten(1, (HEADS, SHARE))[:, :, :, 0], layer.keys, layer.values)


def unpacked(query: Tensor, layer: Layer) -> Tensor:
    """What happens without the kernel."""
    keys, values = (torch.cat([p.read().to(t.dtype), t], 2) for p, t in zip(layer.packed, layer.tail))
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def fused(query: Tensor, layer: Layer, plan: Plan | None = None) -> Tensor:
    return attend(query, SIZE**-0.5, *layer.packed, layer.tail, None, plan)


def microseconds(run: Callable[[Tensor, Layer], Any], query: Tensor, layers: list[Layer], rounds: int = 7) -> float:
    """Of one attention, the median of several replays of a graph over all `layers`."""
    for layer in layers[:2]:
        run(query, layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            run(query, layer)
    took = []
    for number in range(-2, rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number >= 0:
            took.append(1000 * start.elapsed_time(end) / len(layers))
    graph.reset()
    return statistics.median(took)


def cold(bits: int, B: int, L: int) -> list[Layer]:
    """So many layers that none of them is in the L2 cache when its turn comes again."""
    first = Layer(bits, B, L)
    return [first, *(Layer(bits, B, L) for _ in range(COLD // first.nbytes()))]


def queries(B: int) -> Tensor:
    return torch.randn(B, HEADS * SHARE, 1, SIZE, device=DEVICE, dtype=torch.bfloat16)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


@app.command()
def attention(
    lengths: str = "4096,16384,65536,131072", batches: str = "1,8", bits: str = "4,2,8", json: Json = None
) -> None:
    """One attention of one token per row: ratios of times, and the bytes read per second."""
    rows: list[dict[str, Any]] = []
    for B, L in itertools.product(numbers(batches), numbers(lengths)):
        q = queries(B)
        dense = cold(16, B, L)
        times = {run.__name__: microseconds(run, q, dense) for run in (native, grouped)}
        full = dense[0].nbytes()
        del dense
        for b in numbers(bits):
            layers = cold(b, B, L)
            row = {"batch": B, "length": L, "bits": b, "bytes": layers[0].nbytes() / full}
            row["error"] = (
                (fused(q, layers[0]).float() - unpacked(q, layers[0]).transpose(1, 2).float()).abs().max().item()
            )
            row |= {f"{name}_us": t for name, t in times.items()} | {"fused_us": microseconds(fused, q, layers)}
            row["gb_per_s"] = layers[0].nbytes() / row["fused_us"] / 1000
            row["unpacked_us"] = microseconds(unpacked, q, layers[:2])
            for name in ("unpacked", "native", "grouped"):
                row[f"fused/{name}"] = row["fused_us"] / row[f"{name}_us"]
            rows.append(row)
            show(row)
            del layers
            torch.cuda.empty_cache()
    save(json, "attention", rows)


CUTS = [
    Plan(tile, warps, stages, programs)
    for tile, warps in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4), (128, 8))
    for stages in (2, 3, 4)
    for programs in (4, 8, 16)
]


@app.command()
def plans(
    lengths: str = "65536", batches: str = "1,8", bits: str = "4,2", workers: int = 12, json: Json = None
) -> None:
    """Times of several cuts of the kernel over that of the built-in one."""
    rows: list[dict[str, Any]] = []
    work = [(plan, b) for plan in CUTS if plan.programs == CUTS[0].programs for b in numbers(bits)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # what they compile lies on the disk then
        pool.map(_compile, work, chunksize=1)
    for B, L, b in itertools.product(numbers(batches), numbers(lengths), numbers(bits)):
        q, layers = queries(B), cold(b, B, L)
        usual, found = microseconds(fused, q, layers), []
        for plan in CUTS:
            try:
                took = microseconds(functools.partial(fused, plan=plan), q, layers, rounds=5)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{plan}: {error}")
                continue
            found.append({"batch": B, "length": L, "bits": b, "plan": str(plan), "us": took, "of_usual": took / usual})
        found.sort(key=lambda row: row["us"])
        print(f"usual {usual:.1f} us")
        for row in found[:8] + found[-1:]:
            show(row)
        rows += found
    save(json, "plans", rows)


def _compile(work: tuple[Plan, int]) -> None:
    plan, bits = work
    with contextlib.suppress(triton.runtime.errors.OutOfResources):  # said when it is timed
        fused(queries(1), Layer(bits, 1, 4096), plan)
    torch.cuda.synchronize()


@app.command()
def model(
    lengths: str = "16384,65536", steps: int = 24, layers: int = 8, bits: int = 4, batch: int = 1, json: Json = None
) -> None:
    """Milliseconds of decode steps of a LLaMA of random weights (8 layers as wide as those of LLaMA-3-8B), in bf16.

    The uncompressed cache is timed three times. cuDNN's attention, PyTorch's first choice on Hopper, plans anew for
    every length that it has not met in the process: "new" includes that, "native" is the second pass over the same
    lengths, "flash" does without cuDNN.
    """
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=max(numbers(lengths)) + 1024,
    )  # fmt: skip
    with torch.device(DEVICE):
        llama = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    rows: list[dict[str, Any]] = []
    for L in numbers(lengths):
        ids = torch.randint(0, 1024, (batch, L), device=DEVICE)
        row: dict[str, Any] = {"batch": batch, "length": L, "bits": bits, "layers": layers}
        logits = {}
        for kind in ("new", "native", "flash", "unpacked", "fused"):
            if kind in ("unpacked", "fused"):
                hf_compress.compress(llama, "kivi", bits=bits)
            usable = kernels.usable
            if kind == "unpacked":
                kernels.usable = lambda device: False
            torch.backends.cuda.enable_cudnn_sdp(kind != "flash")
            row[f"{kind}_ms"], row[f"{kind}_cache_bytes"], logits[kind] = decode(llama, ids, steps)
            torch.backends.cuda.enable_cudnn_sdp(True)
            kernels.usable = usable
            if kind in ("unpacked", "fused"):
                hf_compress.decompress(llama)
        row["difference"] = (logits["fused"] - logits["unpacked"]).abs().max().item()
        row["scale"] = logits["unpacked"].std().item()
        row |= {f"fused/{kind}": row["fused_ms"] / row[f"{kind}_ms"] for kind in ("unpacked", "native", "flash", "new")}
        rows.append(row)
        show(row)
    save(json, "model", rows)


@torch.no_grad()
def decode(llama: Any, ids: Tensor, steps: int) -> tuple[float, int, Tensor]:
    """Median milliseconds of a step behind a prompt, bytes of the cache, logits of the first step in fp32."""
    cache = llama(ids, logits_to_keep=1).past_key_values
    token, took, first = ids[:, :1], [], None
    for number in range(-4, steps):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = llama(token, past_key_values=cache)
        end.record()
        torch.cuda.synchronize()
        first = out.logits.float() if first is None else first
        if number >= 0:
            took.append(start.elapsed_time(end))
    sizes = [layer.nbytes() if hasattr(layer, "nbytes") else 2 * layer.keys.nbytes for layer in cache.layers]
    assert first is not None
    return statistics.median(took), sum(sizes), first


def show(row: dict[str, Any]) -> None:
    print(
        "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
    )


def save(path: Path | None, what: str, rows: list[dict[str, Any]]) -> None:
    if path is None:
        return
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    run = {"what": what, **record(DEVICE), "triton": triton.__version__, "rows": rows}
    path.write_text(json.dumps([*earlier, run], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if not kernels.available():
        raise SystemExit("the kernel needs a CUDA device of compute capability 8.0 or more, and Triton")
    app()
