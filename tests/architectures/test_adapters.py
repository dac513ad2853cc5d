"""Every adapter of `patches/` on its tiny model, against references that share no code with the engine."""

from types import SimpleNamespace

import pytest
import torch

import hf_compress
from hf_compress.patches.registry import adapter_for
from hf_compress.patches.unsupported import UNSUPPORTED
from tests import tiny
from tests.invariants.reference import FullLength, assert_restored, bare, close, greedy, shared, slots, snapshot
from tests.tiny import ALL_DECODER_ONLY, ALL_VISION, BOS, FURTHER_DECODER_ONLY, IMG, VID, VIDEO

ADAPTERS = hf_compress.architectures()
VLMS = [name for name in ALL_VISION if name in ADAPTERS]
TEXT = [*ALL_DECODER_ONLY, *FURTHER_DECODER_ONLY]
CASES = [(name, "inputs") for name in VLMS] + [(name, "video") for name in VLMS if name in VIDEO]
CASES = [pytest.param(name, kind, id=f"{name}-{kind}") for name, kind in CASES]
SELECTORS = ["uniform", "fastervlm", "divprune", "visionzip", "tome", "downsample"]


def batch_of(name, kind="inputs"):
    return getattr(tiny, kind)(name, bare(name))


def alone(name, batch, row):
    return tiny.single(batch, row, name)


def adapter_of(name):
    return ADAPTERS[bare(name).config.model_type]


# -- the reference: the language model on embeddings shortened by hand -------------------------------------------------
def modality_of(batch):
    return ("video", VID) if (batch["input_ids"] == VID).any() else ("image", IMG)


def spans(name, batch):
    """Rows of the prompt at which each image (or video) of one sample stands."""
    modality, token = modality_of(batch)
    sizes = (tiny._image_tokens if modality == "image" else tiny._video_tokens)(name, batch)
    where = (batch["input_ids"][0] == token).nonzero()[:, 0]
    assert len(where) == sum(sizes)
    return [w.tolist() for w in where.split(sizes)]


def positions_of(name, batch):
    """(1, L), or (3, 1, L) on M-RoPE, of one unpadded sample."""
    ids = batch["input_ids"]
    if adapter_of(name).positions == "renumber":
        return torch.arange(ids.shape[1])[None] + int(name == "paligemma")
    keys = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids", "attention_mask")
    return bare(name).model.get_rope_index(ids, **{key: batch[key] for key in keys if key in batch})[0]


def masks(name, image, prompt):
    """What the language model is given: (1, 1, S, S) bool, one per kind of layer on Gemma 3.

    Args:
        image: (S,) which image each surviving row is of, -1 for text; prompt: how many of them are the prompt.
    """
    at = torch.arange(len(image))
    see = at[:, None] >= at
    if name == "paligemma":
        see = see | (torch.maximum(at[:, None], at) < prompt)
    if name == "gemma3":
        see = see | ((image[:, None] == image) & (image >= 0))
        near = see & (at[:, None] - at < tiny.GEMMA3_WINDOW)
        return {"full_attention": see[None, None], "sliding_attention": near[None, None]}
    return see[None, None]


@torch.no_grad()
def short_logits(name, sample, tokens, kept):
    """(T, V): one sample whose visual rows were cut by hand, without a cache.

    Args:
        sample: one unpadded row; tokens: (T,) generated; kept: indices of the rows that stay, per image.
    """
    model, (modality, token) = bare(name, "sdpa"), modality_of(sample)
    encode = getattr(model.base_model, f"get_{modality}_features")
    out = encode(**tiny.encoder_inputs(sample, modality), return_dict=True)
    features = torch.cat([x.flatten(0, -2) for x in out.pooler_output])
    ids = torch.cat([sample["input_ids"], tokens[None, :-1]], 1)
    x = model.get_input_embeddings()(ids)
    x[ids == token] = features
    image, where = torch.full(ids.shape[1:], -1), spans(name, sample)
    gone = set()
    for i, rows in enumerate(where):
        image[rows] = i
        gone |= set(rows) - {rows[k] for k in kept[i]}
    stay = [row for row in range(ids.shape[1]) if row not in gone]
    given = {}
    if getattr(out, "deepstack_features", None) is not None:
        at = (ids[0] == token).nonzero()[:, 0].tolist()
        rows = [k for k, row in enumerate(at) if row not in gone]
        given["deepstack_visual_embeds"] = [torch.cat(list(deep))[rows] for deep in out.deepstack_features]
        given["visual_pos_masks"] = (ids == token)[:, stay]
    positions = positions_of(name, sample)
    positions = torch.cat([positions, positions[..., -1:] + torch.arange(1, len(tokens))], -1)
    positions = positions[..., : len(stay)] if adapter_of(name).positions == "renumber" else positions[..., stay]
    mask = masks(name, image[stay], sample["input_ids"].shape[1] - len(gone))
    hidden = model.get_decoder()(
        inputs_embeds=x[:, stay], position_ids=positions, attention_mask=mask, use_cache=False, **given
    )
    return model.lm_head(hidden.last_hidden_state)[0, -len(tokens) :]


# -- all of them -------------------------------------------------------------------------------------------------------
def test_every_tiny_model_has_an_adapter_or_a_reason():
    kinds = {tiny.build(name).config.model_type for name in tiny.ALL_ARCHITECTURES + FURTHER_DECODER_ONLY}
    assert kinds - set(ADAPTERS) == {"mllama"} <= set(UNSUPPORTED)
    assert set(adapter_of("llama").model_types) <= kinds


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_ratio_zero_is_the_bare_model(name, kind):
    batch = batch_of(name, kind)
    expected = greedy(bare(name, "sdpa"), batch)
    with shared(name).compressed("uniform", 0) as model:
        run = greedy(model, batch)
    assert torch.equal(run.tokens, expected.tokens)
    close(run.logits, expected.logits)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_uniform_is_the_short_model_and_batches_do_not_matter(name, kind):
    batch = batch_of(name, kind)
    with shared(name).compressed("uniform", 0.5) as model:
        together, last = greedy(model, batch), model.compression.last
        runs = []
        for row in range(2):
            sample = alone(name, batch, row)
            run, kept = greedy(model, sample), model.compression.last.visual_kept
            runs.append((sample, run, kept[0]))
    for row, (sample, run, kept) in enumerate(runs):
        assert kept == last.visual_kept[row]
        assert sum(map(len, kept)) < len(torch.cat([torch.tensor(rows) for rows in spans(name, sample)]))
        close(together.logits[row], run.logits[0])
        close(run.logits[0], short_logits(name, sample, run.tokens[0], kept))


@pytest.mark.parametrize("name", VLMS)
def test_decompress_restores(name):
    model, batch = tiny.build(name), batch_of(name)
    expected = greedy(model, batch)  # transformers itself leaves hooks and rope_deltas behind
    before = snapshot(model)
    for method in ("fastervlm", "tome", "downsample", "snapkv"):
        model.compress(method, 0.5)
        model.decompress()
    model.compress(["fastervlm", "snapkv"], 0.5)
    greedy(model, batch)
    model.decompress()
    assert_restored(model, before)
    close(greedy(model, batch).logits, expected.logits, atol=0)


@pytest.mark.parametrize("method", SELECTORS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_vision_budgets(name, kind, method):
    """Each image keeps half of its tokens (to even on ties), newlines not counted; the rows really are that few."""
    batch = batch_of(name, kind)
    with shared(name).compressed(method, 0.5) as model:
        run, last = greedy(model, batch), model.compression.last
    assert run.logits.isfinite().all()
    for row in range(2):
        sample = alone(name, batch, row)
        gone = 0
        for rows, tokens, kept in zip(spans(name, sample), last.visual_tokens[row], last.visual_kept[row], strict=True):
            held = len(kept) - (len(rows) - tokens)
            assert held == round(tokens / 2) or (method == "downsample" and 0 < held <= round(tokens / 2))
            gone += tokens - held
        assert last.layer_tokens == [[n[0], n[1]] for n in last.layer_tokens]
        assert all(n[row] == sample["input_ids"].shape[1] - gone for n in last.layer_tokens)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
@pytest.mark.parametrize("name", VLMS)
def test_decoder_budgets(name, method):
    """The mean over the layers is what was asked for, as near as whole tokens per stage allow."""
    model, batch = shared(name), batch_of(name)
    least = adapter_of(name).min_drop_layer(model)
    knobs = {"layer": least} if method == "fastv" else {}
    if method == "pyramiddrop" and least > 1:
        with pytest.raises(ValueError, match=f"from layer {least} on"):
            model.compress(method, 0.4)
        return
    with model.compressed(method, 0.4, **knobs):
        run, last = greedy(model, batch), model.compression.last
        whole = [greedy(model, alone(name, batch, row)).logits[0] for row in range(2)]
    layers = len(last.layer_tokens)
    for row in range(2):
        close(run.logits[row], whole[row])
        visual = sum(last.visual_tokens[row])
        text = last.layer_tokens[0][row] - visual
        seen = sum(n[row] - text for n in last.layer_tokens)
        assert abs(seen - 0.6 * layers * visual) <= layers / 2
        assert last.layer_tokens[least - 1][row] == text + visual > last.layer_tokens[-1][row]


@pytest.mark.parametrize("name", [*VLMS, *TEXT])
def test_cache_budgets(name):
    """Layers that see everything keep half of the prompt, sliding ones what they have; a batch is its samples."""
    model, batch = shared(name), batch_of(name)
    windows = [adapter_of(name).window(model.get_decoder(), i) for i in range(4)]
    if all(windows):
        with pytest.raises(ValueError, match="sliding window"):
            model.compress("snapkv", 0.5)
        return
    with model.compressed("snapkv", 0.5, window=4):
        run, last = greedy(model, batch), model.compression.last
        whole = [greedy(model, alone(name, batch, row)).logits[0] for row in range(2)]
    for row, prompt in enumerate(last.prompt_tokens):
        close(run.logits[row], whole[row])
        for window, held in zip(windows, last.cache_tokens):
            assert held[row] == prompt if window else abs(2 * held[row] - prompt) <= 1


@pytest.mark.parametrize("name", [name for name in TEXT if name != "mistral_window"])
@pytest.mark.parametrize("method", ["knorm", "snapkv"])
def test_evicted_entries_are_masked_entries(name, method):
    """After the prompt every layer and head is the bare model that cannot see what was evicted."""
    model, batch = shared(name), batch_of(name)
    with model.compressed(method, 0.5, **({"window": 4} if method == "snapkv" else {})):
        run = greedy(model, batch)
    full = FullLength(name, batch, run.tokens)
    see = evicted(full, run, [full.causal(i) for i in range(full.layers)])
    close(run.logits, softcapped(name, full.logits(see)))


def evicted(full, run, see):
    """The masks, with what each layer and head no longer stores hidden from the rows after the prompt."""
    out = []
    for i, mask in enumerate(see):
        if full.windows[i] is None:
            held = slots(run.cache, i, full.rows + 1, full.heads)[..., : full.rows]
            mask = mask.expand(-1, full.heads, -1, -1).clone()
            mask[:, :, full.prompt :] &= held[:, :, None]
        out.append(mask)
    return out


def softcapped(name, logits):
    """Logits as the model's head leaves them."""
    config = bare(name).config.get_text_config()
    logits = logits / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_projecting_the_features_gives_the_embeddings(name, kind):
    """What methods merge before the projector is what the projector turns into the tokens."""
    batch = batch_of(name, kind)
    modality, _ = modality_of(batch)
    with torch.no_grad(), shared(name).compressed("uniform", 0.5) as model:
        getattr(model.base_model, f"get_{modality}_features")(**tiny.encoder_inputs(batch, modality), return_dict=True)
        compression = model.compression
        encoded, adapter = compression.state.encoded[modality], compression.adapter
        features = adapter.features(model, encoded.call)
        for unit in encoded.units:
            if not unit.pooled:
                embeddings = encoded.images[unit.image][unit.rows]
                close(adapter.project(model, unit.read(features)), embeddings, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_images_that_do_not_match_the_prompt(name, kind):
    batch = dict(batch_of(name, kind))
    ids, (_, token) = batch["input_ids"].clone(), modality_of(batch)
    row, col = (ids == token).nonzero()[0]
    ids[row, col] = 5
    batch["input_ids"] = ids
    with shared(name).compressed("uniform", 0.5) as model, pytest.raises((ValueError, RuntimeError, IndexError)):
        model(**batch)
    assert getattr(model, "compression", None) is None


# -- signals of the towers without [CLS] -------------------------------------------------------------------------------
def square_mean(patches, side, square):
    """(side * side * square**2, C) rows in reading order to the mean of every square, patch by patch."""
    width = side * square
    out = []
    for r in range(side):
        for c in range(side):
            at = [(r * square + i) * width + c * square + j for i in range(square) for j in range(square)]
            out.append(patches[at].mean(0))
    return torch.stack(out)


@pytest.mark.parametrize("name", ["paligemma", "gemma3", "idefics3", "smolvlm"])
def test_surrogate_is_the_attention_received(name):
    """Against the maps of eager attention; on Idefics3 an image with a padded border."""
    model, batch = tiny.build(name, "eager"), dict(tiny.encoder_inputs(batch_of(name)))
    if "pixel_attention_mask" in batch:
        batch["pixel_attention_mask"][0, 1, :, 16:] = 0
    side, square = (6, 1) if name == "paligemma" else (3, 2)
    maps, adapter = [], adapter_of(name)
    block = adapter.attention_blocks(model)[-1]
    handle = adapter.attention_module(model, block).register_forward_hook(lambda _, args, out: maps.append(out[1]))
    with torch.no_grad(), model.compressed("fastervlm", 0.5):
        model.base_model.get_image_features(**batch, return_dict=True)
        call = model.compression.state.encoded["image"].call
        rows = adapter.cls_rows(model, call, block)
        keys = adapter.keys(model, call, block)
    handle.remove()
    real = torch.ones(3, 36, dtype=torch.bool)
    if "pixel_attention_mask" in batch:
        real[1] = (torch.arange(36) % 6) < 4
    for i, row in enumerate(rows):
        received = maps[0][i][:, real[i]].mean(1).T
        close(row, square_mean(received, side, square))
        assert keys[i].shape == (side * side, 8)
        assert torch.allclose(row[real[i].view(side, square, side, square)[:, 0, :, 0].flatten()].sum(), row.sum())


# -- Gemma 3: blocks that see both ways, a window that binds -----------------------------------------------------------
def gemma3_masks(full, batch):
    """Per layer, at full length: causal or within one image, inside the window."""
    image = torch.full((2, full.rows), -1)
    ids = batch["input_ids"]
    for row in range(2):
        starts = (ids[row] == IMG) & torch.cat([torch.tensor([True]), ids[row][:-1] != IMG])
        image[row, : ids.shape[1]] = torch.where(ids[row] == IMG, starts.cumsum(0) - 1, -1)
    block = (image[:, :, None] == image[:, None]) & (image >= 0)[:, None]
    at = torch.arange(full.rows)
    out = []
    for window in full.windows:
        see = (at[:, None] >= at)[None] | block
        see = see & full.valid[:, None]
        out.append((see & (at[:, None] - at < window) if window else see)[:, None])
    return out


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("fastv", dict(layer=1)),
        ("fastv", dict(layer=2)),
        ("pyramiddrop", {}),
        ("snapkv", dict(window=4)),
        ("knorm", {}),
    ],
)
def test_gemma3_drops_and_evicts_behind_a_binding_window(method, knobs):
    model, batch = shared("gemma3"), batch_of("gemma3")
    with model.compressed(method, 0.4, **knobs):
        run, last = greedy(model, batch, max_new_tokens=8), model.compression.last
    full = FullLength("gemma3", batch, run.tokens)
    assert full.windows == [16, None, 16, None] and (batch["attention_mask"].sum(1) + 8 > 16).all()
    see = gemma3_masks(full, batch)
    if method in ("snapkv", "knorm"):
        see = evicted(full, run, see)
    else:
        see = [mask & full.columns(last.layer_index[i])[:, None, None] for i, mask in enumerate(see)]
    close(run.logits, full.logits(see))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("types", [True, False])
def test_gemma3_rows_of_equal_length(attn, types):
    """No padding, so no mask from generate, but one row shrinks and one does not; without token types the masks of
    sdpa are none at all. Long enough for filler slots to leave the sliding layers before the full ones."""
    model = shared("gemma3", attn)
    batch = tiny.batch("gemma3", model, [[BOS, 5, IMG, 7, 8, 9], [BOS, *range(11, 24)]])
    assert batch["attention_mask"].all()
    if not types:
        del batch["token_type_ids"]
    with model.compressed("uniform", 0.5):
        run = greedy(model, batch, max_new_tokens=9)
        for row in range(2):
            close(run.logits[row], greedy(model, alone("gemma3", batch, row), max_new_tokens=9).logits[0])


@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3"])
def test_an_image_in_the_second_turn(name):
    """A returned cache is continued with a prompt that brings an image of its own."""
    model = shared(name)
    first, new = alone(name, batch_of(name), 1), tiny.batch(name, bare(name), [[7, IMG, 9]])
    pixels = {key: new[key] for key in tiny.encoder_inputs(new)}
    with model.compressed("uniform", 0.5):
        out = greedy(model, first).out
        ids = torch.cat([out.sequences, new["input_ids"]], 1)
        both = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        if name == "gemma3":
            both["token_type_ids"] = (ids == IMG).long()
        turn = greedy(model, both | pixels, past_key_values=out.past_key_values)
        whole = {key: torch.cat([first[key], value], int(name == "idefics3")) for key, value in pixels.items()}
        scratch = greedy(model, both | whole)
    close(turn.logits, scratch.logits)
    assert torch.equal(turn.tokens, scratch.tokens)


# -- what cannot be served ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models_say_why(kind):
    model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
    with pytest.raises(ValueError) as error:
        adapter_for(model)
    assert repr(kind) in str(error.value) and UNSUPPORTED[kind] in str(error.value)
    assert kind not in ADAPTERS


def test_mllama_is_left_as_it_was():
    model = tiny.build("mllama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="cross-attention"):
        model.compress("uniform", 0.5)
    assert_restored(model, before)


def test_unknown_models_are_told_what_is_supported():
    model = SimpleNamespace(config=SimpleNamespace(model_type="something"))
    with pytest.raises(ValueError, match=r"something.*supported are.*gemma3.*llava"):
        adapter_for(model)
