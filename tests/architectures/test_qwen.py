"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL (dense and MoE): images, videos with one budget per frame, M-RoPE and DeepStack."""

import functools

import pytest
import torch
import torch.nn.functional as F

import hf_compress
from hf_compress.engine import attention
from tests import tiny
from tests.architectures.helpers import TOLERANCE, counts, encode, greedy, hooks, next_turn, tower_keys, tower_rows
from tests.invariants.language import short_logits, visual_inputs
from tests.tiny import BOS, FAMILIES, GREEDY, IMG, PATCH, VID

NAMES = FAMILIES["qwen"]
DEEPSTACK = [name for name in NAMES if name.startswith("qwen3")]
MAKES = [tiny.video, tiny.both]  # of images alone: tests/invariants
VISION_METHODS = {
    "uniform": {},
    "fastervlm": {},
    "vtc_cls": {"layers": 2},
    "visionzip": {},
    "divprune": {},
    "tome": {},
    "avgpool": {},
}

names = pytest.mark.parametrize("name", NAMES)
makes = pytest.mark.parametrize("make", MAKES)


@functools.cache
def bare(name):
    """Never compressed."""
    return tiny.build(name)


@functools.cache
def model_of(name):
    """Compressed only inside `with`."""
    return tiny.build(name)


def frames_of(batch):
    """Per sample, per image then per video: tokens per frame."""
    out = [[] for _ in batch["input_ids"]]
    for token, key in ((IMG, "image_grid_thw"), (VID, "video_grid_thw")):
        grids = iter(batch.get(key, torch.zeros(0, 3)).tolist())
        for row, n in enumerate((batch["input_ids"] == token).sum(1).tolist()):
            while n:
                t, h, w = next(grids)
                out[row].append([h * w // 4] * t)
                n -= t * h * w // 4
    return out


@names
@makes
@pytest.mark.parametrize("method, knobs", [("visionzip", {}), ("fastv", {"layer": 2}), ("snapkv", {"window": 4})])
def test_ratio_zero_is_the_bare_model(name, make, method, knobs):
    batch = make(name, bare(name))
    tokens, logits, _ = greedy(bare(name), batch)
    with model_of(name).compressed(method, ratio=0, **knobs) as model:
        got, same, _ = greedy(model, batch)
    assert torch.equal(got, tokens) and torch.equal(same, logits)


@names
@makes
@pytest.mark.parametrize("method", ["uniform", "fastervlm"])
def test_equals_embeddings_shortened_by_hand(name, make, method):
    batch = make(name, bare(name))
    with model_of(name).compressed(method, ratio=0.5) as model:
        tokens, logits, _ = greedy(model, batch)
        kept = model.compression.last.visual_kept
        cached = model(**batch).logits[:, -1]
    torch.testing.assert_close(cached, logits[:, 0], rtol=0, atol=TOLERANCE)
    for row in range(2):
        short = short_logits(name, tiny.single(batch, row, name), tokens[row], kept[row])
        torch.testing.assert_close(logits[row], short, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", DEEPSTACK)
def test_deepstack_features_matter_and_belong_to_the_kept_slot(name, monkeypatch):
    """Merged tokens carry the DeepStack features of their own slot; leaving them out would show."""
    batch = tiny.single(tiny.both(name, bare(name)), 0, name)
    features = encode(bare(name), batch)
    seen = {}

    def note(_, args, kwargs):
        seen.update(kwargs)

    with model_of(name).compressed("visionzip", ratio=0.5, contextual=0.25) as model:
        handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        try:
            short = model(**batch).logits
        finally:
            handle.remove()
        kept = model.compression.last.visual_kept[0]
    rows = {m: [] for m in features}
    spans = [(m, i) for m, out in features.items() for i in range(len(out.pooler_output))]
    for (m, i), k in zip(spans, kept):
        rows[m].append((i, k))
    # one image, then one video: the prompt shows in which order they stand
    order = [m for m in dict.fromkeys({IMG: "image", VID: "video"}.get(t) for t in batch["input_ids"][0].tolist()) if m]
    for layer, given in enumerate(seen["deepstack_visual_embeds"]):
        own = [features[m].deepstack_features[layer][i][k] for m in order for i, k in rows[m]]
        assert torch.equal(given, torch.cat(own))
    assert seen["visual_pos_masks"].sum() == len(given) == sum(map(len, kept))
    decoder = model_of(name).get_decoder()
    monkeypatch.setattr(type(decoder), "_deepstack_process", lambda self, hidden, *_: hidden)
    with model_of(name).compressed("visionzip", ratio=0.5, contextual=0.25) as model:
        assert (model(**batch).logits - short).abs().max() > 0.1


@names
@makes
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("method", VISION_METHODS)
def test_budgets_are_exact_per_image_and_per_frame(name, make, method, ratio):
    batch = make(name, bare(name))
    with model_of(name).compressed(method, ratio=ratio, **VISION_METHODS[method]) as model:
        together, _, _ = greedy(model, batch, max_new_tokens=2)
        kept = model.compression.last.visual_kept
        for sample, frames in zip(kept, frames_of(batch)):
            assert len(sample) == len(frames)
            for rows, sizes in zip(sample, frames):
                assert len(rows) == max(1, round(sum(sizes) * (1 - ratio)))
                assert rows == sorted(set(rows))
                per_frame = torch.bincount(torch.tensor(rows) // sizes[0], minlength=len(sizes))
                assert per_frame.sum() == len(rows) and per_frame.max() - per_frame.min() <= 1
        for row in range(2):
            alone, _, _ = greedy(model, tiny.single(batch, row, name), max_new_tokens=2)
            assert model.compression.last.visual_kept == [kept[row]]
            assert torch.equal(alone[0], together[row])


@names
def test_keep_counts_per_image_and_per_video(name):
    with model_of(name).compressed("fastervlm", keep=5) as model:
        greedy(model, tiny.both(name, bare(name)), max_new_tokens=1)
        assert counts(model) == [[5, 5], [5]]


@names
@makes
@pytest.mark.parametrize(
    "method, ratio, knobs",
    [("fastv", 0.4, {"layer": 2}), ("snapkv", 0.5, {"window": 4}), ("pyramiddrop", 0.4, {})],
)
def test_later_stages(name, make, method, ratio, knobs):
    batch = make(name, bare(name))
    if method == "pyramiddrop" and name in DEEPSTACK:  # its boundaries of four layers come before the last injection
        with pytest.raises(ValueError, match="allows it from layer 2 on"):
            model_of(name).compress(method, ratio=ratio)
        return
    visual = sum(sum(map(sum, sample)) for sample in frames_of(batch))
    with model_of(name).compressed(method, ratio=ratio, **knobs) as model:
        together, _, _ = greedy(model, batch)
        last = model.compression.last
        if method == "snapkv":
            whole = batch["attention_mask"].sum(1).tolist()
            assert last.cache_tokens == [[n // 2 for n in whole]] * 4
        else:
            gone = sum(sum(last.prompt_tokens) - sum(tokens) for tokens in last.layer_tokens)
            assert abs(gone / 4 / visual - ratio) < 1.5 / visual * 2
        for row in range(2):
            alone, _, _ = greedy(model, tiny.single(batch, row, name))
            assert torch.equal(alone[0], together[row])


@names
def test_drops_between_layers_leave_full_positions(name):
    """FastV against the bare model: rows that are dropped before layer 2 are hidden from there on."""
    batch = tiny.single(tiny.both(name, bare(name)), 0, name)
    with model_of(name).compressed("fastv", ratio=0.4, layer=2) as model:
        tokens, logits, _ = greedy(model, batch)
        alive = model.compression.last.layer_index[-1][0]
    whole = dict(batch, input_ids=torch.cat([batch["input_ids"], tokens[:, :-1]], 1))
    n = whole["input_ids"].shape[1]
    whole["attention_mask"] = torch.ones(1, n, dtype=torch.long)
    whole["mm_token_type_ids"] = F.pad(batch["mm_token_type_ids"], (0, tokens.shape[1] - 1))
    see = torch.ones(n, n, dtype=torch.bool).tril()
    hidden = sorted(set(range(batch["input_ids"].shape[1])) - set(alive))
    see[:, hidden] = False
    see |= torch.eye(n, dtype=torch.bool)
    handles = [
        layer.register_forward_pre_hook(lambda _, a, k: (a, dict(k, attention_mask=see[None, None])), with_kwargs=True)
        for layer in bare(name).get_decoder().layers[2:]
    ]
    try:
        with torch.no_grad():
            full = bare(name)(**whole, use_cache=False).logits[0, batch["input_ids"].shape[1] - 1 :]
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(logits[0], full, rtol=0, atol=TOLERANCE)


@names
def test_queries_of_a_layer_about_to_run(name):
    """`query_key` foretells what the layer computes: q and k norms, rotation by (t, h, w) positions."""
    model, batch, seen = bare(name), tiny.single(tiny.both(name, bare(name)), 0, name), {}
    adapter, layer = hf_compress.architectures()[name], model.get_decoder().layers[2]
    handle = layer.register_forward_pre_hook(lambda m, a, k: seen.update(k, x=a[0]), with_kwargs=True)
    attention.tap(layer.self_attn, lambda key, call: seen.update(query=call.query, key=call.key), None)
    try:
        with torch.no_grad():
            model(**batch)
            rows = torch.tensor([[4, 11, batch["input_ids"].shape[1] - 1]])
            query, key = adapter.query_key(layer, seen["x"], rows, seen["position_embeddings"])
    finally:
        handle.remove()
        attention.untap(layer.self_attn)
    torch.testing.assert_close(query, seen["query"][:, :, rows[0]], rtol=0, atol=1e-5)
    torch.testing.assert_close(key, seen["key"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DEEPSTACK)
def test_no_drop_before_the_last_deepstack_layer(name):
    model = model_of(name)
    before = hooks(model)
    with pytest.raises(ValueError, match="allows it from layer 2 on"):
        model.compress("fastv", ratio=0.4, layer=1)
    assert hooks(model) == before and getattr(model, "compression", None) is None


@names
@makes
def test_beams(name, make):
    batch = make(name, bare(name))
    beams = dict(num_beams=3, num_return_sequences=2)
    with model_of(name).compressed("fastervlm", ratio=0.5) as model:
        together = model.generate(**batch, **GREEDY, **beams)[:, -5:]
        for row in range(2):
            alone = model.generate(**tiny.single(batch, row, name), **GREEDY, **beams)[:, -5:]
            assert torch.equal(alone, together[2 * row : 2 * row + 2])


@names
@makes
def test_second_turn_on_the_returned_cache(name, make):
    batch = make(name, bare(name))
    if "second_per_grid_ts" in batch:  # of slow videos the last frame stands behind the text that follows them, and
        batch["second_per_grid_ts"] *= 0.25  # transformers then continues elsewhere than it starts (off by 7.6 bare)
    with model_of(name).compressed("fastervlm", ratio=0.5) as model:
        _, _, out = greedy(model, batch)
        turn = next_turn(batch, out, [17, 18, 19])
        tokens, logits, _ = greedy(model, turn, past_key_values=out.past_key_values)
        again, scratch, _ = greedy(model, turn | visual_inputs(batch))
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, scratch, rtol=0, atol=TOLERANCE)


@names
@pytest.mark.parametrize("prompt", [[BOS, 5, IMG, 7, IMG, 8, 9], [BOS, 5, VID, 7, IMG, 8]])
@pytest.mark.parametrize("ratio", [0, 0.5])
def test_second_turn_with_a_new_image(name, prompt, ratio):
    """`generate` itself refuses pixels of some of the images; encoded images with the grids of all are its way."""
    batch = tiny.batch(name, bare(name), [prompt])
    extra = tiny.batch(name, bare(name), [[IMG]])
    new = visual_inputs(extra)
    everything = visual_inputs(batch)
    for key in ("pixel_values", "image_grid_thw"):
        everything[key] = torch.cat([everything[key], new[key]])
    grids = {key: value for key, value in everything.items() if not key.startswith("pixel_values")}
    with model_of(name).compressed("fastervlm", ratio=ratio) as model:
        _, _, out = greedy(model, batch)
        turn = next_turn(batch, out, [17, *extra["input_ids"][0].tolist(), 18, 19])
        _, scratch, _ = greedy(model, turn | everything)
        kept = counts(model)[0]
        _, _, out = greedy(model, batch)
        encoded = model.get_image_features(**new, return_dict=True)
        given = dict(mm_encoder_outputs={"image": encoded}, past_key_values=out.past_key_values)
        _, logits, _ = greedy(model, turn | grids, **given)
        images = prompt.count(IMG)
        assert counts(model)[0] == [kept[images]]
    torch.testing.assert_close(logits, scratch, rtol=0, atol=TOLERANCE)


@names
def test_a_forward_with_a_new_image_continues_a_cache(name):
    """By hand: pixels and positions of the new rows alone."""
    batch = tiny.single(tiny.inputs(name, bare(name)), 0, name)
    extra = tiny.batch(name, bare(name), [[17, IMG, 18, 19]])
    new = visual_inputs(extra)
    keys = ("input_ids", "attention_mask", "mm_token_type_ids")
    whole = {key: torch.cat([batch[key], extra[key]], 1) for key in keys}
    whole |= {key: torch.cat([batch[key], new[key]]) for key in new}
    positions = bare(name).model.get_rope_index(**{k: v for k, v in whole.items() if k != "pixel_values"})[0]
    n = batch["input_ids"].shape[1]
    with torch.no_grad(), model_of(name).compressed("fastervlm", ratio=0.5) as model:
        full = model(**whole).logits
        cache = model(**batch, use_cache=True).past_key_values
        step = dict(input_ids=extra["input_ids"], attention_mask=whole["attention_mask"], **new)
        logits = model(**step, position_ids=positions[..., n:], past_key_values=cache).logits
    torch.testing.assert_close(logits, full[:, n:], rtol=0, atol=TOLERANCE)


@names
@pytest.mark.parametrize("options", [dict(use_cache=False), dict(prefill_chunk_size=7)])
def test_uncached_steps_and_chunks(name, options):
    batch = tiny.both(name, bare(name))
    with model_of(name).compressed("fastervlm", ratio=0.5) as model:
        tokens, logits, _ = greedy(model, batch)
        again, same, _ = greedy(model, batch, **options)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, same, rtol=0, atol=TOLERANCE)


@names
@makes
def test_static_cache(name, make):
    batch = make(name, bare(name))
    with model_of(name).compressed("uniform", ratio=0.5) as model:
        tokens, logits, _ = greedy(model, batch)
        kept = counts(model)
        again, same, _ = greedy(model, batch, cache_implementation="static")
        assert counts(model) == kept
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, same, rtol=0, atol=TOLERANCE)


@names
@pytest.mark.parametrize("make", [tiny.inputs, tiny.video])
def test_wrong_number_of_images(name, make):
    model = model_of(name)
    batch = make(name, model)
    grid = next(key for key in batch if key.endswith("_grid_thw"))
    pixels = "pixel_values" if grid == "image_grid_thw" else "pixel_values_videos"
    last = int(batch[grid][-1].prod())
    fewer = dict(batch, **{grid: batch[grid][:-1], pixels: batch[pixels][:-last]})
    before = hooks(model)
    reference = bare(name)(**batch).logits
    with pytest.raises((ValueError, StopIteration)), model.compressed("fastervlm", ratio=0.5):
        model.generate(**fewer, **GREEDY)
    assert hooks(model) == before
    with model.compressed("fastervlm", ratio=0.5):
        good = model.generate(**batch, **GREEDY)
        with pytest.raises((ValueError, StopIteration)):
            model.generate(**fewer, **GREEDY)
        assert torch.equal(model.generate(**batch, **GREEDY), good)
    assert hooks(model) == before
    assert torch.equal(model(**batch).logits, reference)


# -- what the adapters say about the tower -----------------------------------------------------------------------------
def tower_call(model, batch, modality):
    """The record of one run of the tower and the images that came of it."""
    state = model.compression.context.state
    encode(model, batch)
    encoded = state.encoded[modality]
    return encoded.call, encoded


@names
@pytest.mark.parametrize("make, modality", [(tiny.inputs, "image"), (tiny.video, "video"), (tiny.both, "video")])
def test_projecting_features_gives_the_tokens_bit_for_bit(name, make, modality):
    """What the merger reads, put into reading order and merged, is what the model gives, frame by frame."""
    model = model_of(name)
    batch = make(name, model)
    with torch.no_grad(), model.compressed("visionzip", ratio=0.5):
        adapter = model.compression.context.adapter
        call, encoded = tower_call(model, batch, modality)
        for unit in encoded.units:
            x = unit.read(adapter.features(model, call))
            assert torch.equal(adapter.project(model, x), encoded.images[unit.image][unit.rows])
            h, w = unit.grid
            assert h * w == len(unit.rows) == len(x)
        rows = torch.cat([u.rows for u in encoded.units if u.image == 0])
        assert torch.equal(rows, torch.arange(len(encoded.images[0])))


@names
def test_signals_follow_the_pixels(name):
    """A frame that is changed changes signals of its own crop only, and there the token that was changed most."""
    model = model_of(name)
    batch = tiny.single(tiny.video(name, model), 0, name)
    grid = batch["video_grid_thw"]
    h, w = int(grid[0, 1]) // 2, int(grid[0, 2]) // 2
    with torch.no_grad(), model.compressed("vtc_cls", ratio=0.5, layers=2):
        adapter = model.compression.context.adapter
        block = adapter.attention_blocks(model)[-1]
        call, encoded = tower_call(model, batch, "video")
        rows = [u.read(tower_rows(model, call, block)) for u in encoded.units]
        keys = [u.read(tower_keys(model, call, block)) for u in encoded.units]
        other = dict(batch, pixel_values_videos=batch["pixel_values_videos"].clone())
        other["pixel_values_videos"][h * w * 4 : 2 * h * w * 4] *= -1  # the second frame of the first video
        call, encoded = tower_call(model, other, "video")
        again = [u.read(tower_rows(model, call, block)) for u in encoded.units]
    assert [tuple(r.shape) for r in rows[:2]] == [(h * w, 2)] * 2 and len(keys[0]) == h * w
    assert [bool(torch.equal(a, b)) for a, b in zip(rows, again)] == [i != 1 for i in range(len(rows))]
    for r in rows:  # four patches of a token are averaged, all patches of a frame sum to one
        torch.testing.assert_close(r.sum(0) * 4, torch.ones(r.shape[1]))


@names
def test_packed_attention_is_split_into_frames(name):
    """Kernels for packed sequences attend to all crops in one call."""
    model = model_of(name)
    batch = tiny.video(name, model)
    with torch.no_grad(), model.compressed("fastervlm", ratio=0.5):
        adapter = model.compression.context.adapter
        block = adapter.attention_blocks(model)[-1]
        call, _ = tower_call(model, batch, "video")
        expected = tower_rows(model, call, block)
        records = call.reads[block, "attention"]
        assert len(records) == int(batch["video_grid_thw"][:, 0].sum())
        q, k = (torch.cat([r[i] for r in records], 2) for i in (0, 1))
        call.reads[block, "attention"] = [(q, k, records[0][2])]
        packed = tower_rows(model, call, block)
    assert all(torch.equal(a, b) for a, b in zip(expected, packed))


def patches_of(pictures):
    """(frames, 3, H, W) to the rows of a processor: (t, h/m, w/m, m, m) by (channel, frame, p, p)."""
    frames, _, height, width = pictures.shape
    rows = []
    for t in range(0, frames, 2):
        for y in range(0, height, 2 * PATCH):
            for x in range(0, width, 2 * PATCH):
                for dy in (0, PATCH):
                    for dx in (0, PATCH):
                        patch = pictures[t : t + 2, :, y + dy : y + dy + PATCH, x + dx : x + dx + PATCH]
                        rows.append(patch.transpose(0, 1).flatten())
    return torch.stack(rows)


@names
@pytest.mark.parametrize("token", [IMG, VID])
def test_downsample_resizes_the_pixels(name, token):
    """The tower runs on the resized pictures, and its tokens, DeepStack features included, are what is read."""
    model, frames = model_of(name), 2 if token == IMG else 4
    pictures = torch.rand(frames, 3, 8 * PATCH, 12 * PATCH, generator=torch.Generator().manual_seed(5))
    thw = torch.tensor([[frames // 2, 8, 12]])
    keys = ("pixel_values", "image_grid_thw") if token == IMG else ("pixel_values_videos", "video_grid_thw")
    ids = [BOS, 5, *[3, *[token] * 24] * (frames // 2), 6]  # a group per frame; Qwen2 joins them
    if name not in DEEPSTACK:
        ids = [BOS, 5, *[token] * 12 * frames, 6]
    batch = dict(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    batch["mm_token_type_ids"] = (batch["input_ids"] == token).int() * (1 if token == IMG else 2)
    batch |= {keys[0]: patches_of(pictures), keys[1]: thw}
    seen, rows = {}, []
    with torch.no_grad(), model.compressed("downsample", ratio=0.7):
        handles = [
            model.get_decoder().register_forward_pre_hook(lambda _, a, k: seen.update(k), with_kwargs=True),
            model.model.visual.patch_embed.register_forward_hook(lambda _, a, out: rows.append(len(out))),
        ]
        try:
            model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        last = model.compression.last
        adapter, method = model.compression.context.adapter, model.compression.context.vision_method
    h, w = method.resize((4, 6), 7)
    assert h * w <= 7 and len(last.visual_kept[0][0]) == h * w * frames // 2
    assert rows == [4 * h * w * frames // 2]
    small = F.interpolate(pictures, (h * 2 * PATCH, w * 2 * PATCH), mode="bicubic", antialias=True)
    given = {keys[0]: patches_of(small), keys[1]: torch.tensor([[frames // 2, 2 * h, 2 * w]])}
    (out,) = encode(bare(name), given).values()
    kept = torch.isin(batch["input_ids"][0], torch.tensor(token)).nonzero()[:, 0][last.visual_kept[0][0]]
    short = seen["inputs_embeds"][0, torch.isin(torch.tensor(last.layer_index[0][0]), kept)]
    torch.testing.assert_close(short, out.pooler_output[0], rtol=0, atol=TOLERANCE)
    for mine, theirs in zip(seen.get("deepstack_visual_embeds") or [], getattr(out, "deepstack_features", None) or []):
        torch.testing.assert_close(mine, theirs[0], rtol=0, atol=TOLERANCE)
    assert adapter.resizable and ("deepstack_visual_embeds" in seen) == (name in DEEPSTACK)


@names
def test_downsample_keeps_at_most_the_budget(name):
    for size in (dict(ratio=0.6), dict(keep=5)):
        with model_of(name).compressed("downsample", **size) as model:
            batch = tiny.both(name, model)
            together, _, _ = greedy(model, batch)
            kept = model.compression.last.visual_kept
            for sample, frames in zip(kept, frames_of(batch)):
                for rows, sizes in zip(sample, frames):
                    most = size["keep"] if "keep" in size else round(sum(sizes) * 0.4)
                    assert len(sizes) <= len(rows) <= max(most, len(sizes))
            for row in range(2):
                alone, _, _ = greedy(model, tiny.single(batch, row, name))
                assert torch.equal(alone[0], together[row])


@names
def test_decompress_restores(name):
    model = model_of(name)
    batch = tiny.both(name, model)
    before, logits = hooks(model), bare(name)(**batch).logits
    model.compress(["fastervlm", "snapkv"], ratio=[0.5, 0.3], window=4)
    greedy(model, batch)
    model.decompress()
    assert hooks(model) == before
    assert torch.equal(model(**batch).logits, logits)


def test_every_family_member_has_an_adapter():
    assert set(NAMES) <= set(hf_compress.architectures())
