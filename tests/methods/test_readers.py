"""Readers by toys: masks, a part of the entries, an attention of their own, against masks made by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from hf_compress.methods.base import CacheMethod, head_size
from hf_compress.methods.eviction import Eviction
from hf_compress.methods.inhibition import Inhibition
from hf_compress.methods.reader import Reader
from hf_compress.tensors.attention import group_mean, rows_attention
from tests import tiny
from tests.invariants.reference import FullLength, batch_of, close, fresh, greedy, logits_of, shared, slots
from tests.tiny import GREEDY
from tests.toys import toy

TEXT = ["llama", "qwen3", "gemma2", "qwen2_mixed"]
KERNELS = pytest.mark.parametrize("attn", ["sdpa", "eager"])
STEPS, FIRST, STOP, N = 6, 4, 9, 4


@dataclass
class Own(CacheMethod, Reader):
    """A method that is its own reader, and stores everything as it is."""

    reader = lambda self: self


class Hidden(Own):
    """The caller's rows FIRST to STOP are seen by each other only; of an image, text sees the last token only."""

    def sight(self, keys, queries):
        k, q = keys.index[:, None], queries.index[..., None]
        gone = (k >= FIRST) & (k < STOP) & (q >= STOP)
        last = torch.cat([keys.image[:, 1:] != keys.image[:, :-1], torch.ones_like(keys.image[:, :1]).bool()], 1)
        image = ((keys.image >= 0) & ~last)[:, None] & (queries.image < 0)[..., None]
        return ~(gone | image)[:, None]


class Reused(Own):
    """The first layer that it acts on chooses the N entries of highest attention, all later ones read them alone."""

    def look(self, reading):
        if reading.depth:
            return reading.memory["slots"]
        rows = rows_attention(reading.queries, reading.keys, reading.scaling, reading.visible)
        seen = group_mean(rows[:, :, -1], reading.keys.shape[1])[..., :-1]
        reading.memory["slots"] = seen.topk(N, -1).indices
        return None


class Newest(Own):
    """Attention of its own over the N newest entries that a row may see."""

    def attend(self, reading):
        see = reading.visible
        near = see & (see.flip(-1).long().cumsum(-1).flip(-1) <= N)
        groups = reading.queries.shape[1] // reading.keys.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (reading.keys, reading.values))
        logits = (reading.queries @ keys.mT * reading.scaling).masked_fill(~near, -torch.inf)  # with gradient
        return (logits.softmax(-1) @ values).transpose(1, 2)


@dataclass
class Marked(Eviction, Reader):
    """Evicts the oldest entries of every head by turns; a step reads the older half of those it has not read last."""

    seen: list[torch.Tensor] = field(default_factory=list)

    reader = lambda self: self

    def score(self, view):
        heads = torch.arange(view.shape[1], device=view.order.device)[:, None]
        return ((view.order + heads) % 3).float().expand(view.shape)

    def look(self, reading):
        S = reading.keys.shape[2]
        read = reading.side.setdefault("read", torch.zeros(*reading.keys.shape[:2], S))
        ranked = read[..., :-1].argsort(dim=-1, stable=True)[..., : (S - 1) // 2]
        reading.side["read"] = torch.zeros_like(read).scatter(-1, ranked, 1.0)
        if reading.depth == 0:
            self.seen.append(ranked)
        return ranked


def sight_by_hand(full, name):
    """(B, L, L) bool, for visual tokens as `Hidden` says."""
    B, L = full.valid.shape
    see = torch.ones(B, L, L, dtype=torch.bool)
    see[:, STOP:, FIRST:STOP] = False
    for b in range(B):
        rows = full.images(b)
        every = {i for image in rows for i in image}
        for image in rows:
            for i in range(L):
                if i not in every:
                    see[b, i, image[:-1]] = False
    return see | torch.eye(L, dtype=torch.bool)


@KERNELS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*TEXT, "llava", "qwen2_5_vl", "gemma3"])
def test_sight(name, side, attn):
    """Sliding layers, image blocks, prompt and steps, training without a cache: all see what the mask by hand shows."""
    model, batch = shared(name, attn), batch_of(name, side=side)
    with toy(Hidden, "cache") as key, model.compressed(key):
        if side == "left":
            run = greedy(model, batch, max_new_tokens=STEPS)
        cached = logits_of(model, batch)
        try:
            plain = logits_of(model.train(), batch, use_cache=False)
        finally:
            model.eval()
    tokens = run.tokens if side == "left" else batch["input_ids"][:, :1]
    full = FullLength(name, batch, tokens)
    see = [full.causal(i) & sight_by_hand(full, name)[:, None] for i in range(full.layers)]
    expected = full.run(see)[0]
    real = batch["attention_mask"].bool()
    for got in (plain, cached):
        close(got[real], expected[:, : full.prompt][real])
    if side == "left":
        close(run.logits, full.logits(see))
        assert (full.logits(see) - full.logits([full.causal(i) for i in range(full.layers)])).abs().max() > 0.01


def among(full, see, layers, row, chosen):
    """Row `row` of these layers sees of the older rows only `chosen` (B, Hkv, n) and itself."""
    groups = full.heads // full.kv_heads
    only = torch.zeros(len(chosen), full.kv_heads, full.rows, dtype=torch.bool).scatter(-1, chosen, True)
    only[..., row] = True
    for i in layers:
        see[i] = see[i].expand(-1, full.heads, -1, -1).clone()
        see[i][:, :, row] &= only.repeat_interleave(groups, 1)


@KERNELS
@pytest.mark.parametrize("name", [*TEXT, "llava", "qwen2_5_vl"])
def test_look(name, attn):
    """What one layer chooses later ones read, through the layer's own kernel; a padded batch, masks head by head."""
    model, batch = shared(name, attn), batch_of(name)
    with toy(Reused, "cache") as key, model.compressed(key):
        run = greedy(model, batch, max_new_tokens=STEPS)
        last, totals = model.compression.last, model.compression.report().totals()
    full = FullLength(name, batch, run.tokens)
    first, *others = full.evicting
    see = [full.causal(i) for i in range(full.layers)]
    for row in range(full.prompt, full.rows):
        attention = full.run(see)[1][first][:, :, row, :row]
        among(full, see, others, row, group_mean(attention, full.kv_heads).topk(N, -1).indices)
    close(run.logits, full.logits(see))
    assert (full.logits(see) - full.logits([full.causal(i) for i in range(full.layers)])).abs().max() > 1e-3
    size = 2 * (N + 1) * len(full.valid) * full.kv_heads * head_size(model) * 4
    assert last.read_bytes == dict.fromkeys(others, size)
    assert totals["read_bytes"] == sum(last.cache_bytes) - sum(last.cache_bytes[i] - size for i in others)


@KERNELS
@pytest.mark.parametrize("name", ["llama", "qwen3", "llava"])
def test_attend(name, attn):
    model, batch = shared(name, attn), batch_of(name)
    with toy(Newest, "cache") as key, model.compressed(key):
        run = greedy(model, batch, max_new_tokens=STEPS)
    full = FullLength(name, batch, run.tokens)
    see = [full.causal(i) for i in range(full.layers)]
    close(run.logits, full.logits([s & (s.flip(-1).long().cumsum(-1).flip(-1) <= N) for s in see]))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_mixed"])
@torch.no_grad()
def test_sight_in_turns(name):
    """A prompt that is fed in two parts sees what it would have seen at once."""
    model, batch = shared(name), batch_of(name, "equal")
    ids = batch["input_ids"]
    full = FullLength(name, batch, ids[:, :1])
    expected = full.run([full.causal(i) & sight_by_hand(full, name)[:, None] for i in range(full.layers)])[0]
    with toy(Hidden, "cache") as key, model.compressed(key):
        first = model(ids[:, :7])
        later = model(ids[:, 7:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, later.logits], 1), expected[:, : ids.shape[1]])


def test_training():
    """Gradients go through an attention of its own, which gradient checkpointing would leave out."""
    model, batch = fresh("llama"), batch_of("llama", "equal")
    full = FullLength("llama", batch, batch["input_ids"][:, :1])
    near = [s & (s.flip(-1).long().cumsum(-1).flip(-1) <= N) for s in (full.causal(i) for i in range(full.layers))]
    with toy(Newest, "cache") as key, model.compressed(key):
        out = model.train()(**batch, labels=batch["input_ids"], use_cache=False)
        out.loss.backward()
        close(out.logits.detach(), full.run(near)[0][:, : full.prompt])
        first = model.model.layers[0].self_attn.q_proj.weight.grad
        assert first.isfinite().all() and first.any()
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="gradient checkpointing: method='toy' takes part in the attention"):
            model(**batch, labels=batch["input_ids"], use_cache=False)


@pytest.mark.parametrize("name", ["llama", "qwen2_mixed"])
def test_what_is_remembered_moves_with_the_entries(name):
    """A reader on top of eviction per head; it reads by turns what it has marked."""
    model, batch = shared(name), batch_of(name)
    with toy(Marked, "cache") as key, model.compressed(key, ratio=0.5):
        run = greedy(model, batch, max_new_tokens=STEPS)
        turns = model.compression.context.cache_method.seen
    full = FullLength(name, batch, run.tokens)
    see = [full.causal(i) for i in range(full.layers)]
    stay = {i: slots(run.cache, i, full.rows, full.kv_heads) for i in full.evicting}
    for i in full.evicting:
        index = run.cache.layers[i].layout.index  # nothing generated goes
        read = torch.zeros_like(index[..., : index.shape[-1] - STEPS + 1])
        for step, row in enumerate(range(full.prompt, full.rows)):
            read = torch.cat([read, torch.zeros_like(read[..., :1])], -1)
            chosen = read[..., :-1].argsort(dim=-1, stable=True)[..., : (read.shape[-1] - 1) // 2]
            assert i != full.evicting[0] or torch.equal(chosen, turns[step])
            read = torch.zeros_like(read).scatter(-1, chosen, 1)
            among(full, see, [i], row, index.gather(-1, chosen))
            see[i][:, :, row] &= stay[i].repeat_interleave(full.heads // full.kv_heads, 1)
            see[i][:, :, row, row] = True
    close(run.logits, full.logits(see))


@pytest.mark.parametrize("cls", [Hidden, Reused, Newest])
def test_ratio_zero_is_the_bare_model(cls):
    model, batch = shared("llama"), batch_of("llama")
    plain = greedy(model, batch, max_new_tokens=STEPS)
    with toy(cls, "cache") as key, model.compressed(key, ratio=0):
        assert torch.equal(greedy(model, batch, max_new_tokens=STEPS).logits, plain.logits)


def test_candidates():
    """Tokens fed together read everything, so that only a sight can have its candidates checked."""
    model = shared("llama")
    batch = tiny.batch("llama", model, [[1, *[5, 6, 7] * 7]])
    lookup = dict(prompt_lookup_num_tokens=4, max_matching_ngram_size=1, max_new_tokens=20)
    for cls in (Reused, Newest):
        with toy(cls, "cache") as key, model.compressed(key), pytest.raises(ValueError, match="prompt_lookup"):
            model.generate(**batch, **(GREEDY | lookup))
    with toy(Hidden, "cache") as key, model.compressed(key):
        expected = model.generate(**batch, **(GREEDY | dict(max_new_tokens=20)))
        assert torch.equal(model.generate(**batch, **(GREEDY | lookup)), expected)


def test_what_it_looks_at_is_checked():
    class Wrong(Own):
        """Slots of one head."""

        def look(self, reading):
            return torch.zeros(len(reading.keys), 1, 2, dtype=torch.int64)

    model, batch = shared("llama"), batch_of("llama")
    plain = logits_of(model, batch)
    with (
        toy(Wrong, "cache") as key,
        model.compressed(key),
        pytest.raises(ValueError, match=r"look: \(2, 1, 2\) is not"),
    ):
        greedy(model, batch, max_new_tokens=2)
    assert torch.equal(logits_of(model, batch), plain)


@pytest.mark.parametrize("slot", [-1, 24])  # the entry behind the last older one is the row's own: it would count twice
def test_it_looks_at_older_entries_only(slot):
    class Wrong(Own):
        """One slot, which is none of the 24 of the prompt."""

        def look(self, reading):
            return torch.full((*reading.keys.shape[:2], 1), slot)

    model = shared("llama")
    with (
        toy(Wrong, "cache") as key,
        model.compressed(key),
        pytest.raises(ValueError, match=rf"look: slots {slot} to {slot} must be in range\(24\)"),
    ):
        greedy(model, batch_of("llama"), max_new_tokens=2)


class Tells(Own):
    """Masks and outputs of other shapes."""

    kind: ClassVar[str]

    def sight(self, keys, queries):
        see = torch.ones(len(queries.index), 1, queries.index.shape[1], keys.index.shape[-1], dtype=torch.bool)
        return {"flat": see[:, 0], "real": see.float(), "short": see[..., 1:]}.get(self.kind, see)

    def attend(self, reading):
        return {"heads first": reading.queries, "one": reading.queries[0]}.get(self.kind)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("flat", r"sight: torch.bool of shape \(2, 24, 24\) is not bool"),
        ("real", "sight: torch.float32 of shape"),
        ("short", r"sight: torch.bool of shape \(2, 1, 24, 23\)"),
        ("heads first", r"attend: \(2, 4, 24, 8\) is not \(B, q, Hq, d\) = \(2, 24, 4, d\)"),
        ("one", r"attend: \(4, 24, 8\)"),
    ],
)
def test_what_a_reader_says_is_checked(wrong, message):
    class Wrong(Tells):
        kind = wrong

    model = shared("llama")
    with toy(Wrong, "cache") as key, model.compressed(key), pytest.raises(ValueError, match=message):
        model(**batch_of("llama"))


# ---- what text is kept from looking at
def focus_by_hand(attention, text, image):
    """F = A_tt A_ti of one sample, in loops: `attention` (L, L), rows of text and columns of images by number."""
    return {t: [sum(attention[t, s] * attention[s, i] for s in text if s <= t) for i in image] for t in text}


def test_focus_of_the_card():
    """A_tt A_ti; of three tokens the one of least focus goes from every row."""
    A = (
        torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]),
        torch.tensor([[4.0, 1, 1], [1, 2, 3], [3, 0, 1]]) / 10,
    )
    both = torch.zeros(6, 6)
    both[3:, 3:], both[3:, :3] = A
    found = focus_by_hand(both, [3, 4, 5], [0, 1, 2])
    close(
        torch.tensor([found[t] for t in (3, 4, 5)]),
        torch.tensor([[0.4, 0.1, 0.1], [0.25, 0.15, 0.2], [0.26, 0.08, 0.16]]),
    )


def inhibited(full, after, hide, turn=None):
    """Masks of all layers, text rows behind layer `after` without what they focus on least."""
    see = [full.causal(i).expand(-1, 1, -1, -1) for i in range(full.layers)]
    attention = full.run(see)[1][after].double().mean(1)
    hidden = torch.zeros(len(attention), 1, full.rows, full.rows, dtype=torch.bool)
    for b in range(len(attention)):
        image = sorted(i for rows in full.images(b) for i in rows)
        text = [i for i in range(full.rows) if full.valid[b, i] and i not in image]
        for t, focus in focus_by_hand(attention[b], text, image).items():
            seen = [n for n, i in enumerate(image) if see[after][b, 0, t, i]]
            for n in sorted(seen, key=lambda n: (float(focus[n]), n))[: int(len(seen) * hide + 1e-9)]:
                hidden[b, 0, t, image[n]] = True
    return [mask & ~hidden if i > after and full.windows[i] is None else mask for i, mask in enumerate(see)]


@KERNELS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_text_is_kept_from_what_it_focuses_on_least(name, side, attn):
    """Prompt and steps against masks made from the attention of the bare model; in training without a cache too."""
    model, batch, hide = shared(name, attn), batch_of(name, side=side), 0.3
    with toy(Inhibition, "cache") as key, model.compressed(key, hide=hide, after=1):
        if side == "left":
            run = greedy(model, batch, max_new_tokens=STEPS)
        cached = logits_of(model, batch)
        try:
            plain = logits_of(model.train(), batch, use_cache=False)
        finally:
            model.eval()
    full = FullLength(name, batch, run.tokens if side == "left" else batch["input_ids"][:, :1])
    see = inhibited(full, 1, hide)
    expected, real = full.run(see)[0], batch["attention_mask"].bool()
    for got in (plain, cached):
        close(got[real], expected[:, : full.prompt][real])
    bare = full.run([full.causal(i) for i in range(full.layers)])[0]
    assert (expected - bare)[:, : full.prompt][real].abs().max() > 0.01
    if side == "left":
        close(run.logits, full.logits(see))


@pytest.mark.parametrize("method", ["fastv", None])
def test_vmtc_with_inhibition_is_both_parts(method):
    """As its clusters and a method of the cache stage that hides; beams, and layers that hold fewer rows."""
    model, batch = shared("llava"), batch_of("llava")
    more = [] if method is None else [method]
    with (
        toy(Inhibition, "cache") as key,
        model.compressed(
            ["vmtc", *more, key],
            ratio=[0.5, *[0.25] * len(more), None],
            hide=[0.0, *[None] * len(more), 0.4],
            **({"layer": 2} if more else {}),
        ),
    ):
        wanted = greedy(model, batch, max_new_tokens=STEPS)
        beams = model.generate(**batch, **{**GREEDY, "num_beams": 2})
    knobs = {"hide": [0.4, *[None] * len(more)], "ratio": [0.5, *[0.25] * len(more)]}
    with model.compressed(["vmtc", *more], **knobs, **({"layer": 2} if more else {})):
        found = greedy(model, batch, max_new_tokens=STEPS)
        close(found.logits, wanted.logits, 1e-6)
        assert torch.equal(model.generate(**batch, **{**GREEDY, "num_beams": 2}), beams)
        assert "vmtc" in str(model.compression.report())
    with model.compressed("vmtc", ratio=0.0, hide=0.4):
        close(greedy(model, batch, max_new_tokens=STEPS).logits, greedy_of_bare(batch).logits, 1e-6)


def greedy_of_bare(batch):
    return greedy(shared("llava"), batch, max_new_tokens=STEPS)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"hide": 1.0}, "hide=1.0"), ({"hide": 0.1, "hide_after": 3}, "hide_after=3: no later layer")],
)
def test_what_vmtc_cannot_hide(knobs, message):
    model = shared("llava")
    with pytest.raises(ValueError, match=message):
        model.compress("vmtc", ratio=0.5, **knobs)
    with pytest.raises(ValueError, match="both act in the cache stage"):
        model.compress(["vmtc", "snapkv"], ratio=0.5, hide=0.1)
    assert model.compression is None
