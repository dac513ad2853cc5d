"""Attention that undoes merging, against the bare model on all rows, those of a group held equal."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from hf_compress.methods.base import VisionMethod
from hf_compress.methods.unmerging import Unmerging
from hf_compress.signals import Assignment
from tests.invariants.language import rerun
from tests.invariants.reference import FullLength, batch_of, close, greedy, logits_of, shared
from tests.toys import toy

STEPS = 5
NAMES = ["llava", "internvl", "idefics3", "mistral3"]


@dataclass
class Folded(VisionMethod):
    """Token i goes into token i modulo the number that stays, by plain means."""

    positions: str = "original"

    def parts(self, layers, tokens, ratio, keep):
        return {"vision": (self, ratio, keep), "cache": (Unmerging(), None, None)}

    def assign(self, tokens, keep):
        groups = torch.arange(tokens.count, device=tokens.device).expand(len(tokens), -1) % keep
        return Assignment(torch.arange(keep, device=tokens.device).expand(len(tokens), -1), groups)


class Merged(Folded):
    """The same, left merged."""

    parts = VisionMethod.parts


def mixing(full):
    """(B, L, L): the mean over the rows of each group, one for all other rows."""
    B, L = full.valid.shape
    out = torch.eye(L).repeat(B, 1, 1)
    for b in range(B):
        for rows in full.visual(b):
            keep = max(1, round(len(rows) / 2))
            for k in range(keep):
                mine = rows[k::keep]
                out[b, mine] = 0
                for i in mine:
                    out[b, i, mine] = 1 / len(mine)
    return out


def expected(full):
    """Logits (B, L, V): merged embeddings at all places of a group, and in every layer the mean of what they read."""
    mix, hooks = mixing(full), []

    def mean(module, args, out):
        return (mix @ out[0], *out[1:])

    def change(kwargs):
        real = full.valid.long()
        x = mix @ kwargs["inputs_embeds"]
        return dict(kwargs, inputs_embeds=x, position_ids=full.positions, attention_mask=real)

    try:
        hooks += [layer.self_attn.register_forward_hook(mean) for layer in full.model.get_decoder().layers]
        return rerun(full.model, full.batch, change, [full.causal(i) for i in range(full.layers)])[0], mix
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_unmerging(name, side, attn):
    """Prompt, steps, training without a cache."""
    model, batch = shared(name, attn), batch_of(name, side=side)
    with toy(Folded, "vision") as key, model.compressed(key, ratio=0.5):
        if side == "left":
            run = greedy(model, batch, max_new_tokens=STEPS)
            entries = model.compression.last.cache_tokens
        cached = logits_of(model, batch)
        try:
            plain = logits_of(model.train(), batch, use_cache=False)
        finally:
            model.eval()
    full = FullLength(name, batch, run.tokens if side == "left" else batch["input_ids"][:, :1])
    logits, mix = expected(full)
    stays = batch["attention_mask"].bool() & (mix.diagonal(dim1=1, dim2=2) == 1)[:, : full.prompt]
    for got in (cached, plain):
        close(got[stays], logits[:, : full.prompt][stays])
    with toy(Merged, "vision") as key, model.compressed(key, ratio=0.5):
        assert (logits_of(model, batch) - cached)[stays].abs().max() > 1e-3
    if side == "left":
        close(run.logits, logits[:, full.prompt - 1 :][:, : run.logits.shape[1]])
        assert max(max(row) for row in entries) < full.prompt


@pytest.mark.parametrize("where", ["tower", "output"])
def test_dymu(where, monkeypatch):
    """Whatever went into a token, in the tower or behind it, is known; beams, chat turns; nothing merged: as bare."""
    model, batch, owners = shared("llava"), batch_of("llava"), []
    attend = Unmerging.attend

    def spy(self, reading):
        owners.append(reading.owner)
        return attend(self, reading)

    monkeypatch.setattr(Unmerging, "attend", spy)
    with model.compressed("dymu", ratio=0.5, where=where, unmerge=True):
        logits_of(model, batch)
        kept, full = model.compression.last.visual_kept, FullLength("llava", batch, batch["input_ids"][:, :1])
        for b, images in enumerate(kept):
            for rows, mine in zip(full.images(b), images):
                assert {rows[int(i)] for i in mine} == set(owners[0][b, rows].tolist()) != set(rows)
        one = greedy(model, batch, max_new_tokens=STEPS)
        text = {"input_ids": one.out.sequences, "attention_mask": F.pad(batch["attention_mask"], (0, STEPS), value=1)}
        more = greedy(model, text, past_key_values=one.out.past_key_values, max_new_tokens=2)
        assert more.logits.isfinite().all()
        assert model.generate(**batch, max_new_tokens=3, num_beams=2).shape[0] == 2
    bare = greedy(model, batch, max_new_tokens=STEPS).logits
    with model.compressed("dymu", "adaptive", threshold=1.0, where=where, unmerge=True):
        close(greedy(model, batch, max_new_tokens=STEPS).logits, bare)


def test_autocast():
    """What was rotated is fp32 then, and values are not."""
    model, batch = shared("llava"), batch_of("llava")
    with toy(Folded, "vision") as key, model.compressed(key, ratio=0.5):
        exact = greedy(model, batch, max_new_tokens=STEPS)
        with torch.autocast("cpu", torch.bfloat16):
            run = greedy(model, batch, max_new_tokens=STEPS)
    with toy(Merged, "vision") as key, model.compressed(key, ratio=0.5):
        merged = greedy(model, batch, max_new_tokens=STEPS)
    error, change = ((other.logits[:, 0] - exact.logits[:, 0]).abs().mean() for other in (run, merged))
    assert run.logits.isfinite().all() and error < change / 10


def test_another_turn():
    """Steps behind a second turn go on as if both had been one prompt: what stood for what is kept with the cache."""
    model, batch = shared("llava"), batch_of("llava", "equal")
    with toy(Folded, "vision") as key, model.compressed(key, ratio=0.5):
        one = greedy(model, batch, max_new_tokens=STEPS)
        grown = torch.cat([one.out.sequences, one.out.sequences[:, -3:]], 1)
        later = {"input_ids": grown, "attention_mask": torch.ones_like(grown)}
        two = greedy(model, later, past_key_values=one.out.past_key_values, max_new_tokens=STEPS)
        whole = greedy(model, {**batch, **later}, max_new_tokens=STEPS)
    close(two.logits, whole.logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen2_5_vl", r"positions \(t, h, w\)"),
        ("gemma3", "layers with a sliding window"),
    ],
)
def test_models_that_are_refused(name, message):
    model = shared(name)
    with pytest.raises(ValueError, match=message):
        model.compress("dymu", ratio=0.5, where="output", unmerge=True)
    assert model.compression is None


def test_knobs_that_are_refused():
    model = shared("llava")
    with pytest.raises(ValueError, match="positions='renumber': with unmerge=True"):
        model.compress("dymu", ratio=0.5, unmerge=True, positions="renumber")
    with pytest.raises(ValueError, match="unmerge='yes'"):
        model.compress("dymu", ratio=0.5, unmerge="yes")
    with pytest.raises(ValueError, match="both act in the cache stage"):
        model.compress(["dymu", "snapkv"], ratio=0.5, unmerge=[True, None])
    assert model.compression is None


@pytest.mark.parametrize("method", [("dymu", {"unmerge": True}), ("vmtc", {"hide": 0.4})])
def test_masks_that_say_more(method):
    """A ready-made mask, and samples that share a row, are refused: what they hide would be seen."""
    name, knobs = method
    model, batch = shared("llava"), batch_of("llava", "equal")
    ahead = shared("paligemma")
    with ahead.compressed(name, ratio=0.5, **knobs), pytest.raises(ValueError, match="rows that see ahead"):
        ahead(**batch_of("paligemma"))
    L = batch["input_ids"].shape[1]
    ready = batch | {"attention_mask": torch.ones(1, 1, L, L, dtype=torch.bool).tril()}
    packed = {"input_ids": batch["input_ids"].repeat(1, 2), "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)}
    packed["position_ids"] = torch.arange(L).repeat(2)[None]
    with model.compressed(name, ratio=0.5, **knobs):
        with pytest.raises(ValueError, match="takes part in the attention, which a ready-made mask"):
            model(**ready)
        try:
            with pytest.raises(ValueError, match="samples"):
                model.train()(**packed, use_cache=False)
        finally:
            model.eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("part", ["unmerging", "inhibition"])
def test_columns_that_nobody_fills(part, side):
    """A batch that is padded beyond its longest sample, as pad_to_multiple_of does."""
    model, batch = shared("llava"), batch_of("llava", side=side)
    pad = (3, 0) if side == "left" else (0, 3)
    longer = batch | {key: F.pad(batch[key], pad, value=0) for key in ("input_ids", "attention_mask")}
    real, more = batch["attention_mask"].bool(), longer["attention_mask"].bool()
    knobs = {"positions": "original"} if part == "inhibition" else {}
    with toy(Folded, "vision") as key:
        method, options = (key, {}) if part == "unmerging" else ("vmtc", {"hide": 0.4, **knobs})
        with model.compressed(method, ratio=0.5, **options):
            close(logits_of(model, longer)[more], logits_of(model, batch)[real])
