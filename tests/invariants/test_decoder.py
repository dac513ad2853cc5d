"""Invariant 5: dropping rows before a layer equals the full-length model with these columns masked from there on."""

import pytest

from tests.invariants.reference import (
    VLMS,
    FullLength,
    adapter_of,
    batch_of,
    close,
    compressed,
    greedy,
    logits_of,
    matrix,
    options,
    refusal,
    shared,
    slots,
)


@pytest.mark.parametrize("kind", ["inputs", "mixed", "edges", "equal"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@matrix("dropping")
def test_equals_masked_columns(method, name, attn, kind):
    """Prefill and every decode step."""
    if name not in VLMS and kind in ("mixed", "edges"):
        return  # of images
    model, batch = shared(name, attn), batch_of(name, kind)
    with compressed(model, method):
        run, last = greedy(model, batch), model.compression.last
    full = FullLength(name, batch, run.tokens)
    close(run.logits, full.logits(full.survivors(last.layer_index)))


@matrix("dropping")
def test_forward_equals_masked_columns(method, name):
    """All surviving rows of one forward, with and without a cache, padded on either side."""
    for side in ("left", "right"):
        model, batch = shared(name), batch_of(name, side=side)
        with compressed(model, method):
            got, last = logits_of(model, batch), model.compression.last
            uncached = logits_of(model, batch, use_cache=False)
        full = FullLength(name, batch, batch["input_ids"][:, :1])
        expected = full.run(full.survivors(last.layer_index))[0]
        for b, rows in enumerate(last.layer_index[-1]):
            close(got[b, rows], expected[b, rows])
            close(uncached[b, rows], expected[b, rows])


@pytest.mark.parametrize("kind", ["inputs", "equal"])
@matrix("looking")
def test_the_best_visual_rows_stay(method, name, kind):
    """Nested sets, text whole, as many visual rows per layer as the plan says, and those of highest attention."""
    model, batch = shared(name), batch_of(name, kind)
    with compressed(model, method):
        logits_of(model, batch)
        last, drops = model.compression.last, model.compression.context.decoder_method
        stage = model.compression.context.stages["decoder"]
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    for b in range(len(last.prompt_tokens)):
        visual = {row for image in full.visual(b) for row in image}
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
    return full.run(full.survivors(index))[1][read][:, :, -1].mean(1).tolist()


@matrix("picking")
def test_scope_per_image(method, name):
    """Each image loses in proportion to its size."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method, scope="per_image"):
        run, last = greedy(model, batch), model.compression.last
    full = FullLength(name, batch, run.tokens)
    close(run.logits, full.logits(full.survivors(last.layer_index)))
    for b in range(2):
        for rows in last.layer_index:
            kept = [len(set(image) & set(rows[b])) for image in full.visual(b)]
            sizes = [len(image) for image in full.visual(b)]
            share = sum(kept) / sum(sizes)
            assert all(abs(k - n * share) < 1 for k, n in zip(kept, sizes))


@matrix("picking")
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_stages_compose(method, name, attn):
    """Vision, decoder and cache stage together: full length, each layer masked by what it really holds."""
    model, batch = shared(name, attn), batch_of(name)
    knobs = {k: v for k, v in options(method, model).items() if k != "ratio"}
    methods, ratios = ["fastervlm", method], [0.5, 0.3]
    if refusal("snapkv", name) is None:
        methods, ratios, knobs = [*methods, "snapkv"], [*ratios, 0.4], knobs | {"window": 4}
    with model.compressed(methods, ratio=ratios, **knobs):
        run, last = greedy(model, batch), model.compression.last
    full, order = FullLength(name, batch, run.tokens), None
    if adapter_of(name).positions == "renumber":  # survivors of the vision stage, and windows are measured in that
        order = full.columns(last.layer_index[0]).long().cumsum(1).sub(1).clamp(min=0)
        full = FullLength(name, batch, run.tokens, order + int(name == "paligemma"))
    see = full.survivors(last.layer_index, order)
    if "snapkv" in methods:
        see = full.evicted(see, run.cache)
        for i in full.evicting:
            held = slots(run.cache, i, full.rows, full.heads)[:, :, : full.prompt].sum(-1)
            assert held.tolist() == [[len(rows) * 6 // 10] * full.heads for rows in last.layer_index[i]]
    close(run.logits, full.logits(see))
    assert last.visual_left == [[round(n / 2) for n in sample] for sample in last.visual_tokens]
