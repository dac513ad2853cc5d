"""Invariant 5: dropping rows before a layer equals the full-length model with these columns masked from there on."""

import pytest
import torch

from tests.invariants.reference import (
    FullLength,
    batch_of,
    close,
    compressed,
    greedy,
    logits_of,
    matrix,
    options,
    shared,
    slots,
)
from tests.tiny import IMG, VISION

WINDOWED = [*VISION, "llava_window"]


def masks(full, last):
    """Per layer: causal, and of the prompt only the rows that entered the layer."""
    return [full.causal(i) & full.columns(rows)[:, None, None] for i, rows in enumerate(last.layer_index)]


@pytest.mark.parametrize("kind", ["inputs", "mixed", "edges", "equal"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@matrix("decoder", WINDOWED)
def test_equals_masked_columns(method, name, attn, kind):
    """Prefill and every decode step."""
    model, batch = shared(name, attn), batch_of(name, kind)
    with compressed(model, method):
        run, last = greedy(model, batch), model.compression.last
    full = FullLength(name, batch, run.tokens)
    close(run.logits, full.logits(masks(full, last)))


@matrix("decoder", VISION)
def test_forward_equals_masked_columns(method, name):
    """All surviving rows of one forward, with and without a cache, padded on either side."""
    for side in ("left", "right"):
        model, batch = shared(name), batch_of(name, side=side)
        with compressed(model, method):
            got, last = logits_of(model, batch), model.compression.last
            uncached = logits_of(model, batch, use_cache=False)
        full = FullLength(name, batch, batch["input_ids"][:, :1])
        expected = full.run(masks(full, last))[0]
        for b, rows in enumerate(last.layer_index[-1]):
            close(got[b, rows], expected[b, rows])
            close(uncached[b, rows], expected[b, rows])


@matrix("decoder", VISION)
def test_the_best_visual_rows_stay(method, name):
    """Nested sets, text whole, as many visual rows per layer as the plan says, and those of highest attention."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        logits_of(model, batch)
        last, drops = model.compression.last, model.compression.drops
        stage = model.compression.stages["decoder"]
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    for b in range(2):
        visual = set((batch["input_ids"][b] == IMG).nonzero()[:, 0].tolist())
        text = set(batch["attention_mask"][b].nonzero()[:, 0].tolist()) - visual
        plan, alive = drops.plan(full.layers, len(visual), stage.ratio), text | visual
        for layer in range(full.layers):
            rows = set(last.layer_index[layer][b])
            assert text <= rows <= alive
            if layer in plan:
                assert len(rows & visual) == plan[layer]
                read = layer - 1 if drops.source == "own" else layer
                attention = attention_of_last_row(full, last, layer, read)[b]
                ranked = sorted(alive & visual, key=lambda j: (-attention[j], j))
                assert rows & visual == set(ranked[: plan[layer]])
            alive = rows


def attention_of_last_row(full, last, layer, read):
    """(B, L) head-mean attention of the last prompt row in layer `read`, nothing dropped before `layer` yet."""
    index = last.layer_index[:layer] + [last.layer_index[layer - 1]] * (full.layers - layer)
    see = [full.causal(i) & full.columns(rows)[:, None, None] for i, rows in enumerate(index)]
    return full.run(see)[1][read][:, :, -1].mean(1).tolist()


@matrix("decoder", VISION)
def test_scope_per_image(method, name):
    """Each image loses in proportion to its size."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method, scope="per_image"):
        run, last = greedy(model, batch), model.compression.last
    full = FullLength(name, batch, run.tokens)
    close(run.logits, full.logits(masks(full, last)))
    for b in range(2):
        for rows in last.layer_index:
            kept = [len(set(image) & set(rows[b])) for image in images_of(batch["input_ids"][b])]
            sizes = [len(image) for image in images_of(batch["input_ids"][b])]
            share = sum(kept) / sum(sizes)
            assert all(abs(k - n * share) < 1 and k >= 1 for k, n in zip(kept, sizes))


def images_of(ids):
    """Runs of placeholders."""
    runs, open_ = [], False
    for i, token in enumerate(ids.tolist()):
        if token == IMG:
            if not open_:
                runs.append([])
            runs[-1].append(i)
        open_ = token == IMG
    return runs


@matrix("decoder", VISION)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_stages_compose(method, name, attn):
    """Vision, decoder and cache stage together: full length, each layer masked by what it really holds."""
    model, batch = shared(name, attn), batch_of(name)
    knobs = {k: v for k, v in options(method).items() if k != "ratio"} | {"window": 4}
    with model.compressed(["fastervlm", method, "snapkv"], ratio=[0.5, 0.3, 0.4], **knobs):
        run, last = greedy(model, batch), model.compression.last
        visual = last.visual_kept
    positions = None
    valid = batch["attention_mask"].bool()
    if name == "llava":  # survivors of the vision stage are renumbered
        entered = torch.zeros_like(valid)
        for b, rows in enumerate(last.layer_index[0]):
            entered[b, rows] = True
        steps = run.tokens.shape[1] - 1
        positions = torch.cat([entered, entered.new_ones(2, steps)], 1).long().cumsum(1).sub(1).clamp(min=0)
    full = FullLength(name, batch, run.tokens, positions)
    see = []
    for i, rows in enumerate(last.layer_index):
        base = full.causal(i) & full.columns(rows)[:, None, None]
        held = slots(run.cache, i, full.rows, full.heads)
        late = torch.arange(full.rows)[:, None] >= full.prompt
        see.append(base & (held[:, :, None] | ~late))
        kept = [len(r) * 6 // 10 for r in rows]
        assert held[:, :, : full.prompt].sum(-1).tolist() == [[k] * full.heads for k in kept]
    close(run.logits, full.logits(see))
    assert [len(k) for sample in visual for k in sample] == [
        round(n / 2) for sample in last.visual_tokens for n in sample
    ]
