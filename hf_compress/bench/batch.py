"""Batch truth: a padded batch keeps what each sample keeps alone, computes the same logits, and what it costs.

Prompts of different lengths, padded left, with an image of their own each where the model sees. The vision tower is in
the times of both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_compress.bench.models import Subject, stage
from hf_compress.bench.timing import CLOCKS, Candidate, Ratio, interleave
from hf_compress.patches.versions import cache_of

SAME = 1.0  # share of kept sets that agree
CLOSE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}  # logits, over their standard deviation
TIME = 1.10  # the batch over its samples one by one, over the same quotient of the bare model


@dataclass
class BatchRow:
    """One method at one ratio.

    Attributes:
        same: share of kept sets (per layer and sample; of caches per head too) that are the same alone.
        logits: largest difference of the last row's logits over their standard deviation; `limit` depends on the dtype.
        time: batch over the sum of single runs; bare: the same of the bare model.
    """

    model: str
    method: str
    stage: str
    ratio: float
    batch: int
    same: float | None = None
    logits: float | None = None
    limit: float = 0.0
    time: Ratio | None = None
    bare: Ratio | None = None
    note: str = ""

    @property
    def failures(self) -> list[str]:
        """Which limits are missed."""
        out = []
        if self.same is not None and self.same < SAME:
            out.append("kept sets")
        if self.logits is not None and self.logits > self.limit:
            out.append("logits")
        if self.time and self.bare and self.time.pairs.median > TIME * self.bare.pairs.median:
            out.append("time")
        return out

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"failures": self.failures}


def prompts(subject: Subject, batch: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A left-padded batch and its samples: sample b lacks the first b text tokens, pictures differ by noise."""
    line, g = subject.ids[:1], torch.Generator().manual_seed(1)
    samples = []
    for b in range(batch):
        ids = line[:, b:] if subject.image_token is None or int(line[0, b]) != subject.image_token else line
        one: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, x in subject.vision.items():
            x = x[: len(x) // len(subject.ids)]
            noise = torch.randn(x.shape, generator=g).to(x) if x.is_floating_point() else 0
            one[name] = x + noise if x.is_floating_point() else x
        samples.append(_places(subject, one))
    longest = max(s["input_ids"].shape[1] for s in samples)

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (longest - x.shape[1], 0))

    whole = {name: torch.cat([padded(s[name]) for s in samples]) for name in ("input_ids", "attention_mask")}
    whole |= {name: torch.cat([s[name] for s in samples]) for name in subject.vision}
    return _places(subject, whole), samples


def _places(subject: Subject, given: dict[str, Any]) -> dict[str, Any]:
    """With M-RoPE positions where the model has them, and what all runs have in common."""
    if subject.positions is not None:
        ids, mask = given["input_ids"], given["attention_mask"]
        own = {"mm_token_type_ids": (ids == subject.image_token).int(), "attention_mask": mask}
        grid = given["image_grid_thw"]
        given["position_ids"], _ = subject.model.base_model.get_rope_index(ids, image_grid_thw=grid, **own)
    return given | {"logits_to_keep": 1}


def kept(model: Any, cache: Any, lengths: list[int]) -> list[Any]:
    """Per sample: which of its rows stay, per layer, and which of its entries, per layer and head."""
    last, longest = model.compression.last, max(lengths)
    out = []
    for b, n in enumerate(lengths):
        pad = longest - n
        sets: list[Any] = [[i - pad for i in layer[b]] for layer in last.layer_index]
        for layer in cache.layers:
            index, valid = layer.layout.index, layer.layout.valid
            index, valid = (t[:, None] if t.ndim == 2 else t for t in (index, valid))
            sets += [(index[b, h][valid[b, h]] - pad).tolist() for h in range(index.shape[1])]
        out.append(sets)
    return out


@torch.no_grad()
def measure(
    subject: Subject,
    method: str,
    ratios: Sequence[float],
    *,
    batch: int = 4,
    rounds: int = 3,
    warmup: int = 1,
    clock: str = "wall",
) -> list[BatchRow]:
    """All rows of one method; the batch and its samples take turns, compressed and bare."""
    whole, samples = prompts(subject, batch)
    lengths = [s["input_ids"].shape[1] for s in samples]
    rows, candidates = [], _pair("bare", subject.model, whole, samples)
    for ratio in ratios:
        row = BatchRow(subject.name, method, stage(method), ratio, batch, limit=CLOSE[subject.model.dtype])
        rows.append(row)
        try:
            model = subject.compressed(method, ratio)
            together = model(**whole)
        except ValueError as refused:
            row.note = str(refused)
            continue
        sets = kept(model, cache_of(together), lengths)
        agree, worst = [], 0.0
        for b, sample in enumerate(samples):
            alone = model(**sample)
            mine = kept(model, cache_of(alone), lengths[b : b + 1])[0]
            agree += [x == y for x, y in zip(sets[b], mine, strict=True)]
            logits = alone.logits[0, -1].float()
            worst = max(worst, float((together.logits[b, -1].float() - logits).abs().max() / logits.std()))
        row.same, row.logits = sum(agree) / len(agree), worst
        candidates |= _pair(ratio, model, whole, samples)
    options: dict[str, Any] = {"device": subject.device, "clock": CLOCKS[clock]}
    seconds = interleave(candidates, rounds=rounds, warmup=warmup, **options)
    bare = Ratio.of(seconds["bare", "batch"], seconds["bare", "single"])
    for row in rows:
        if row.same is not None:
            row.time, row.bare = Ratio.of(seconds[row.ratio, "batch"], seconds[row.ratio, "single"]), bare
    return rows


def _pair(name: Any, model: Any, whole: dict[str, Any], samples: list[dict[str, Any]]) -> dict[Any, Candidate]:
    return {
        (name, "batch"): Candidate(lambda: model(**whole)),
        (name, "single"): Candidate(lambda: [model(**s) for s in samples]),
    }
