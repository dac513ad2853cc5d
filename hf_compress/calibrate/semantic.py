"""Semantic retrieval heads and layer errors, from prompts that hide a needle (CompressKV)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from hf_compress.calibrate.files import SEMANTIC, Decoder, place, reading, save
from hf_compress.engine.attention import Call
from hf_compress.engine.undo import UndoLog
from hf_compress.methods.base import check_count
from hf_compress.patches.versions import cache_name, cache_of
from hf_compress.tensors.attention import rows_attention
from hf_compress.tensors.ranking import pooled_votes

EPSILON = 1e-5  # of the relative errors


@torch.no_grad()
def semantic_heads(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    *,
    keep: int = 256,
    voters: int = 4,
    window: int = 8,
    kernel: int = 5,
    max_new_tokens: int = 50,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Which query heads of a layer look at the answer, and how much each layer suffers when its cache shrinks.

    Two passes of greedy answers, one sample after the other:

    1. Heads. An answer counts if it has more than half of the reference tokens (ROUGE-1 recall on token ids). At every
       step whose new token is one of the needle's, each head is credited with its attention to the whole needle, once
       per place where the token stands in it. The score of a head is the mean over samples.
    2. Layers. The cache of a layer is reduced to `keep` entries as the method does it with the `voters` best heads, and
       its attention output (after the output projection) is compared with the one of the full cache, which goes on.
       The error of a layer is ||O' - O|| / (||O|| + 1e-5), summed over all steps; errors are scaled to sum to 1.

    Source: CompressKV, arXiv:2508.02401, whose released code credits the token that a step gives, not the one it reads.

    Args:
        model: a model that is not compressed, in eval mode.
        samples: what `model.generate` takes (`input_ids` (1, L) and the like), with "needle": (start, stop), the rows
            of `input_ids` that hold it, and optionally "answer": the reference token ids (default: the needle's).
        keep: entries per KV head in the second pass; shorter prompts say nothing there.
        voters, window, kernel: as the method will use them.
        max_new_tokens: of an answer.
        path: file to write; None: "semantic_heads.json" in the folder that the model was loaded from.
        progress: show a progress bar.

    Returns:
        what was written: "heads", per layer the scores of its query heads, and "errors", one number per layer; None
        where a layer has a sliding window.

    Raises:
        ValueError: the model is compressed, a sample is malformed, no answer finds its needle, no prompt is longer than
            `keep`, or there is no place to write to.
    """
    _check(keep=keep, voters=voters, window=window, kernel=kernel, max_new_tokens=max_new_tokens)
    file, decoder = place(model, SEMANTIC, path), Decoder(model)
    parts = [_parts(sample, i) for i, sample in enumerate(samples)]
    run = _Run(model, decoder, max_new_tokens)
    with tqdm(total=2 * len(parts), desc="semantic heads", unit="answer", disable=not progress) as bar:
        scores = _needle_scores(run, parts, bar)
        best = {i: s.argsort(descending=True, stable=True)[:voters].tolist() for i, s in scores.items()}
        errors = _layer_errors(run, parts, best, (keep, window, kernel), bar)
    every = range(len(decoder.layers))
    heads = [scores[i].tolist() if i in scores else None for i in every]
    return save(
        model, file, {"keep": keep, "samples": len(parts), "heads": heads, "errors": [errors.get(i) for i in every]}
    )


def _check(**counts: int) -> None:
    for name, count in counts.items():
        check_count(name, count)
    if counts["kernel"] % 2 == 0:
        raise ValueError(f"kernel={counts['kernel']} must be odd, so that pooling is centred")
    if counts["keep"] <= counts["window"]:
        raise ValueError(
            f"keep={counts['keep']} must be larger than window={counts['window']}, which stays in any case"
        )


Parts = tuple[dict[str, Any], tuple[int, int], list[int]]  # arguments of generate, span of the needle, reference


def _parts(sample: Mapping[str, Any], number: int) -> Parts:
    inputs = {k: v for k, v in sample.items() if k not in ("needle", "answer")}
    ids, span = inputs.get("input_ids"), sample.get("needle")
    if not torch.is_tensor(ids) or ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(f"samples[{number}]: input_ids must be a (1, L) tensor; one sample at a time")
    if span is None or len(span) != 2 or not 0 <= span[0] < span[1] <= ids.shape[1]:
        raise ValueError(
            f"samples[{number}]: needle={span!r} must be (start, stop) rows of its {ids.shape[1]} input_ids"
        )
    answer = sample.get("answer")
    reference = ids[0, span[0] : span[1]] if answer is None else answer
    return inputs, (int(span[0]), int(span[1])), torch.as_tensor(reference).flatten().tolist()


class _Run:
    """Greedy answers of the bare model with taps on the layers that see everything."""

    def __init__(self, model: Any, decoder: Decoder, max_new_tokens: int):
        self.model, self.decoder, self.max_new_tokens = model, decoder, max_new_tokens

    def __call__(self, inputs: dict[str, Any], sink: Any, hook: Any = None) -> list[int]:
        """The new tokens; `sink` reads every attention call, `hook` follows every attention module."""
        with reading(self.model) as log:
            self._listen(log, sink, hook)
            out = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                **{cache_name(self.model): DynamicCache(config=self.decoder.config)},
            )
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def _listen(self, log: UndoLog, sink: Any, hook: Any) -> None:
        for i in self.decoder.full:
            attention = self.decoder.layers[i].self_attn
            log.tap(attention, sink, i)
            if hook is not None:
                log.hook(attention, hook(i))


# -- heads ----------------------------------------------------------------------------------------------------------
def _needle_scores(run: _Run, parts: list[Parts], bar: Any) -> dict[int, Tensor]:
    """{layer: (Hq,)}: attention to the needle while the answer says it, mean over the samples that find it."""
    found: list[dict[int, Tensor]] = []
    for inputs, span, reference in parts:
        reader = _NeedleReader(span)
        answer = run(inputs, reader.read)
        if recall(answer, reference) > 0.5:
            needle = Counter(inputs["input_ids"][0, span[0] : span[1]].tolist())
            times = torch.tensor([needle[token] for token in answer], dtype=torch.float64)
            found.append({i: times @ torch.stack(steps[: len(answer)]) for i, steps in reader.mass.items()})
        bar.update()
    if not found:
        raise ValueError(
            f"samples: none of {len(parts)} answers has more than half of its reference tokens, so no head can be "
            "credited; use easier prompts, or a model that answers them"
        )
    return {i: torch.stack([scores[i] for scores in found]).mean(0) for i in found[0]}


class _NeedleReader:
    """Attention of the newest row of every forward to the needle, per layer."""

    def __init__(self, span: tuple[int, int]):
        self.span = span
        self.mass: dict[int, list[Tensor]] = {}

    def read(self, layer: int, call: Call) -> None:
        """The sink of a tap."""
        newest = call.query[:, :, -1:]  # it sees everything
        a = rows_attention(newest, call.key, call.scaling, None)[0, :, 0]
        self.mass.setdefault(layer, []).append(a[:, slice(*self.span)].sum(1).double().cpu())


def recall(answer: Sequence[int], reference: Sequence[int]) -> float:
    """ROUGE-1 recall on token ids: the share of the reference that the answer has, repetitions counted."""
    return sum((Counter(answer) & Counter(reference)).values()) / max(1, len(reference))


# -- layers ---------------------------------------------------------------------------------------------------------
def _layer_errors(
    run: _Run, parts: list[Parts], voters: dict[int, list[int]], size: tuple[int, int, int], bar: Any
) -> dict[int, float]:
    """{layer: its share of all errors}."""
    total = dict.fromkeys(voters, 0.0)
    for inputs, _, _ in parts:
        shadow = _Shadow(voters, *size)
        if inputs["input_ids"].shape[1] > size[0]:
            run(inputs, shadow.read, shadow.hook)
        for i, error in shadow.errors.items():
            total[i] += error
        bar.update()
    everything = sum(total.values())
    if not everything:
        raise ValueError(
            f"keep={size[0]}: no prompt is longer, or no answer has a second token, so no layer is ever compressed; "
            "measure with fewer entries, or longer prompts and answers"
        )
    return {i: error / everything for i, error in total.items()}


class _Shadow:
    """Runs every attention a second time over a reduced cache; what goes on is the full one."""

    def __init__(self, voters: dict[int, list[int]], keep: int, window: int, kernel: int):
        self.voters, self.keep, self.window, self.kernel = voters, keep, window, kernel
        self.stay: dict[int, Tensor] = {}  # (L,) bool of the prompt
        self.step: tuple[Tensor, Tensor, float] | None = None
        self.reduced: Tensor | None = None  # what the attention gives in its second run
        self.errors: dict[int, float] = {}

    def read(self, layer: int, call: Call) -> Tensor | None:
        """The sink of a tap."""
        if self.reduced is not None:
            return self.reduced
        query, key, scaling = call.record()
        self.step = None
        if layer in self.stay:
            self.step = query, key, scaling
            return None
        L = key.shape[2]
        every = torch.arange(L, device=key.device)
        rows = rows_attention(
            query[:, :, -self.window :], key, scaling, (every <= every[-self.window :, None])[None, None]
        )
        ranking = pooled_votes(rows, self.voters[layer], (every >= L - self.window)[None, None], self.kernel)[0, 0]
        best = ranking.argsort(descending=True, stable=True)[: self.keep]
        self.stay[layer] = torch.zeros(L, dtype=torch.bool, device=key.device).index_fill(0, best, True)
        return None

    def hook(self, layer: int) -> Any:
        """The forward hook of one attention module."""

        def compare(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            if self.step is None:
                return
            query, key, scaling = self.step
            values = cache_of(kwargs).layers[layer].values
            stay = F.pad(self.stay[layer], (0, key.shape[2] - len(self.stay[layer])), value=True)
            a = rows_attention(query, key, scaling, stay[None, None, None])
            grouped = a.to(values.dtype).unflatten(1, (values.shape[1], -1)).flatten(2, 3) @ values
            self.reduced = grouped.view(*query.shape[:3], -1).transpose(1, 2)
            try:  # the module finishes the reduced output as it does its own
                again = module.forward(*args, **{**kwargs, cache_name(module): None})[0].float()
            finally:
                self.reduced = None
            whole = out[0].float()
            error = (again - whole).norm() / (whole.norm() + EPSILON)
            self.errors[layer] = self.errors.get(layer, 0.0) + error.item()

        return compare
