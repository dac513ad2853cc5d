"""Retrieval heads: which heads look back at an earlier occurrence of the present token (RazorAttention)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_compress.calibrate.files import RETRIEVAL, Decoder, place, reading, save
from hf_compress.engine.attention import Call
from hf_compress.methods.base import check_count
from hf_compress.tensors.attention import rows_attention

CHUNK = 2**24  # most attention weights held at once (64 MiB)


@torch.no_grad()
def retrieval_heads(
    model: nn.Module,
    *,
    tokens: int = 2500,
    copies: int = 4,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Echo and induction score of every KV head, on random tokens that are repeated; no data is needed.

    The prompt is BOS and `copies` times the same `tokens` random ids. A row beyond the first copy echoes as far as it
    attends to earlier occurrences of its own token, and induces as far as it attends to the tokens behind them. Both
    are means over these rows; a KV head has the largest score of the query heads of its group. One forward, in which
    the attention of each layer is computed once more in blocks of rows, never tokens x tokens.

    Source: RazorAttention, ICLR 2025, arXiv:2407.15891.

    Args:
        model: a model that is not compressed, in eval mode; attn_implementation="sdpa", where the prompt is long.
        tokens: random ids per copy (the paper: 2500; some hundred give the same order).
        copies: how often they appear, at least 2.
        seed: the ids are drawn by it.
        path: file to write; None: "retrieval_heads.json" in the folder that the model was loaded from.
        progress: show a progress bar.

    Returns:
        what was written: "echo" and "induction", per layer a list per KV head, None where a layer has a sliding window.

    Raises:
        ValueError: the model is compressed, or there is no place to write to.
    """
    check_count("tokens", tokens)
    check_count("copies", copies, least=2)
    file, decoder = place(model, RETRIEVAL, path), Decoder(model)
    ids = _repeated(model, decoder, tokens, copies, seed)
    with (
        reading(model) as log,
        tqdm(total=len(decoder.full), desc="retrieval heads", unit="layer", disable=not progress) as bar,
    ):
        scan = _Scan(tokens, copies, decoder.kv_heads, bar)
        for i in decoder.full:
            log.tap(decoder.layers[i].self_attn, scan.read, i)
        decoder.module(input_ids=ids, use_cache=False)
    every = range(len(decoder.layers))
    names = ("echo", "induction")
    scores = {name: [scan.scores[i][k] if i in scan.scores else None for i in every] for k, name in enumerate(names)}
    return save(model, file, {"tokens": tokens, "copies": copies, "seed": seed, **scores})


class _Scan:
    """Takes the scores of a layer as soon as it runs; nothing of its attention is kept."""

    def __init__(self, tokens: int, copies: int, kv_heads: int, bar: Any):
        self.tokens, self.copies, self.kv_heads, self.bar = tokens, copies, kv_heads, bar
        self.scores: dict[int, tuple[list[float], list[float]]] = {}

    def read(self, layer: int, call: Call) -> None:
        """The sink of a tap."""
        echo, induction = echo_induction(*call.record(), self.tokens, self.copies)
        best = [s.view(self.kv_heads, -1).amax(1).tolist() for s in (echo, induction)]
        self.scores[layer] = best[0], best[1]
        self.bar.update()


def echo_induction(query: Tensor, key: Tensor, scaling: float, tokens: int, copies: int) -> tuple[Tensor, Tensor]:
    """(Hq,) echo and induction scores of one layer, from the queries (1, Hq, S, d) and keys of the repeated prompt.

    Row 0 is BOS, so S = 1 + copies * tokens and an earlier occurrence lies a multiple of `tokens` rows back.
    """
    S = query.shape[2]
    every = torch.arange(S, device=query.device)
    sums = torch.zeros(2, query.shape[1], device=query.device, dtype=torch.float64)
    for rows in every[1 + tokens :].split(max(1, CHUNK // (query.shape[1] * S))):
        a = rows_attention(query[:, :, rows], key, scaling, (every <= rows[:, None])[None, None])[0]
        earlier = rows[:, None] - tokens * torch.arange(1, copies, device=rows.device)
        for shift in (0, 1):
            at = (earlier + shift).clamp(min=0)
            sums[shift] += (a.gather(2, at.expand(len(a), -1, -1)) * (earlier > 0)).sum((1, 2))
    mean = sums / (S - 1 - tokens)
    return mean[0], mean[1]


def _repeated(model: nn.Module, decoder: Decoder, tokens: int, copies: int, seed: int) -> Tensor:
    """(1, 1 + copies * tokens) BOS and the copies of random ids, none of them special."""
    config, embeddings = decoder.config, decoder.module.get_input_embeddings()
    special: set[int | None] = set(decoder.adapter.placeholders(model.config).values())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(config, name, None)
        special.update(given if isinstance(given, (list, tuple)) else [given])
    plain = torch.tensor([i for i in range(embeddings.num_embeddings) if i not in special])
    random = plain[torch.randint(len(plain), (tokens,), generator=torch.Generator().manual_seed(seed))]
    bos = getattr(config, "bos_token_id", None)
    first = plain[:1] if bos is None else torch.tensor([bos])
    return torch.cat([first, random.repeat(copies)])[None].to(embeddings.weight.device)
