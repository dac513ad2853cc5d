"""Every adapter of `patches/` on its tiny model, against references that share no code with the engine."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Lfm2Config, LlavaConfig, LlavaForConditionalGeneration

import hf_compress
from hf_compress.patches.registry import adapter_for
from hf_compress.patches.unsupported import UNSUPPORTED
from tests import tiny
from tests.architectures.helpers import tower_keys, tower_rows
from tests.invariants.reference import (
    VLMS,
    FullLength,
    adapter_of,
    assert_restored,
    bare,
    close,
    greedy,
    refusal,
    shared,
    short_logits,
    snapshot,
    windows,
)
from tests.tiny import BOS, FAMILIES, FURTHER_DECODER_ONLY, IMG, VID, VIDEO

ADAPTERS = hf_compress.architectures()
CASES = [(name, "inputs") for name in VLMS] + [(name, "video") for name in VIDEO]
CASES = [pytest.param(name, kind, id=f"{name}-{kind}") for name, kind in CASES]
VIDEOS = CASES[len(VLMS) :]  # what is tested on these alone, tests/invariants test with images
SELECTORS = ["uniform", "fastervlm", "divprune", "visionzip", "tome", "downsample"]


def batch_of(name, kind="inputs"):
    return getattr(tiny, kind)(name, bare(name))


def alone(name, batch, row):
    return tiny.single(batch, row, name)


def modality_of(batch):
    return ("video", VID) if (batch["input_ids"] == VID).any() else ("image", IMG)


def spans(name, batch):
    """Rows of the prompt at which each image (or video) of one sample stands."""
    return FullLength(name, batch, batch["input_ids"][:, :1]).images(0)


# -- all of them -------------------------------------------------------------------------------------------------------
def test_every_tiny_model_has_an_adapter_or_a_reason():
    kinds = {tiny.build(name).config.model_type for name in tiny.ALL_ARCHITECTURES + FURTHER_DECODER_ONLY}
    assert kinds - set(ADAPTERS) == {"mllama"} <= set(UNSUPPORTED)
    assert set(adapter_of("llama").model_types) <= kinds


@pytest.mark.parametrize(("name", "kind"), VIDEOS)
def test_ratio_zero_is_the_bare_model(name, kind):
    batch = batch_of(name, kind)
    expected = greedy(bare(name, "sdpa"), batch)
    with shared(name).compressed("uniform", 0) as model:
        run = greedy(model, batch)
    assert torch.equal(run.tokens, expected.tokens)
    close(run.logits, expected.logits)


@pytest.mark.parametrize(("name", "kind"), VIDEOS)
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
    stages = ["fastervlm", *(["snapkv"] if refusal("snapkv", name) is None else [])]
    for method in (*stages, "tome", "downsample"):
        model.compress(method, 0.5)
        model.decompress()
    model.compress(stages, 0.5)
    greedy(model, batch)
    model.decompress()
    assert_restored(model, before)
    close(greedy(model, batch).logits, expected.logits, atol=0)


@pytest.mark.parametrize("method", SELECTORS)
@pytest.mark.parametrize(("name", "kind"), VIDEOS)
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


@pytest.mark.parametrize("name", FURTHER_DECODER_ONLY)
def test_cache_budgets(name):
    """Layers that see everything keep half of the prompt, sliding ones what they have; a batch is its samples."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("snapkv", 0.5, window=4):
        run, last = greedy(model, batch), model.compression.last
        whole = [greedy(model, alone(name, batch, row)).logits[0] for row in range(2)]
    for row, prompt in enumerate(last.prompt_tokens):
        close(run.logits[row], whole[row])
        for window, held in zip(windows(name), last.cache_tokens):
            assert held[row] == min(prompt, window - 1) if window else abs(2 * held[row] - prompt) <= 1


@pytest.mark.parametrize("name", FURTHER_DECODER_ONLY)
@pytest.mark.parametrize("method", ["knorm", "snapkv"])
def test_evicted_entries_are_masked_entries(name, method):
    """After the prompt every layer and head is the bare model that cannot see what was evicted."""
    model, batch = shared(name), batch_of(name)
    with model.compressed(method, 0.5, **({"window": 4} if method == "snapkv" else {})):
        run = greedy(model, batch)
    full = FullLength(name, batch, run.tokens)
    see = [full.causal(i) for i in range(full.layers)]
    close(run.logits, full.logits(full.evicted(see, run.cache)))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_projecting_the_features_gives_the_embeddings(name, kind):
    """What methods merge before the projector is what the projector turns into the tokens."""
    batch = batch_of(name, kind)
    modality, _ = modality_of(batch)
    with torch.no_grad(), shared(name).compressed("uniform", 0.5) as model:
        getattr(model.base_model, f"get_{modality}_features")(**tiny.encoder_inputs(batch, modality), return_dict=True)
        compression = model.compression
        encoded, adapter = compression.context.state.encoded[modality], compression.context.adapter
        features = adapter.features(model, encoded.call)
        for unit in encoded.units:
            if not unit.pooled:
                embeddings = encoded.images[unit.image][unit.rows]
                close(adapter.project(model, unit.read(features)), embeddings, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), VIDEOS)
def test_images_that_do_not_match_the_prompt(name, kind):
    batch = dict(batch_of(name, kind))
    ids, (_, token) = batch["input_ids"].clone(), modality_of(batch)
    row, col = (ids == token).nonzero()[0]
    ids[row, col] = 5
    batch["input_ids"] = ids
    with shared(name).compressed("uniform", 0.5) as model, pytest.raises((ValueError, RuntimeError, IndexError)):
        model(**batch)
    assert getattr(model, "compression", None) is None


@pytest.mark.parametrize("name", [n for f in ("cohere", "pixtral", "glm", "omni") for n in FAMILIES[f]])
def test_every_patch_belongs_to_one_token(name):
    """Rows and keys of the tokens; with the patches of a token in a mean, the attention received sums to one."""
    with torch.no_grad(), shared(name).compressed("visionzip", 0.5) as model:
        model.base_model.get_image_features(**tiny.encoder_inputs(batch_of(name)), return_dict=True)
        encoded, adapter = model.compression.context.state.encoded["image"], model.compression.context.adapter
        block = adapter.attention_blocks(model)[-1]
        for unit in encoded.units:
            rows = unit.read(tower_rows(model, encoded.call, block))
            torch.testing.assert_close(rows.sum(0) * 4, torch.ones(rows.shape[1]))
            assert len(unit.read(tower_keys(model, encoded.call, block))) == len(rows) == unit.grid[0] * unit.grid[1]


def test_videos_of_glm_are_refused():
    """They use the placeholder of images, and nothing tells the two apart."""
    batch = batch_of("glm4v")
    video = {k: v for k, v in batch.items() if k not in ("pixel_values", "image_grid_thw")}
    video |= dict(pixel_values_videos=batch["pixel_values"], video_grid_thw=batch["image_grid_thw"])
    video["mm_token_type_ids"] = 2 * video["mm_token_type_ids"]
    with shared("glm4v").compressed("uniform", 0.5) as model, pytest.raises(ValueError, match="images only"):
        model(**video)


def test_videos_and_images_of_omni():
    with shared("qwen2_5_omni_thinker").compressed("fastervlm", 0.5) as model:
        greedy(model, batch_of("qwen2_5_omni_thinker", "both"))
        assert model.compression.last.visual_left == [[8, 8], [6]]


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
        call = model.compression.context.state.encoded["image"].call
        rows, keys = tower_rows(model, call, block), tower_keys(model, call, block)
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
    see = full.survivors(last.layer_index)
    close(run.logits, full.logits(full.evicted(see, run.cache) if method in ("snapkv", "knorm") else see))


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


# -- Gemma 4: layers that read the keys and values of earlier ones ----------------------------------------------------
def test_gemma4_layers_without_entries_of_their_own():
    """They see what the layer sees whose entries they read; the cache stays that of transformers there."""
    model, batch = shared("gemma4"), batch_of("gemma4")
    with model.compressed("uniform", 0.5):
        run, last = greedy(model, batch, max_new_tokens=12), model.compression.last
        report = model.compression.report().rows()
    kinds = [type(layer).__name__ for layer in run.cache.layers]
    assert kinds == ["HeldLayer", "HeldLayer", "DummyLayer", "DummyLayer"]
    assert last.cache_bytes[2:] == [0, 0] and all(n > 0 for n in last.cache_tokens[0])
    assert [row["cache_entries"] for row in report][2:] == [0, 0]
    assert (batch["attention_mask"].sum(1) + 12 > tiny.GEMMA3_WINDOW).all()  # the window binds
    for row in range(2):
        sample = alone("gemma4", batch, row)
        close(run.logits[row], short_logits("gemma4", sample, run.tokens[row], last.visual_kept[row]))


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_gemma4_runs_its_last_layers_for_the_rows_asked_for(kept):
    """Logits of the last rows are those of all, whichever way they are asked for."""
    model, batch = shared("gemma4"), batch_of("gemma4")
    with torch.no_grad(), model.compressed("uniform", 0.5):
        whole = model(**batch).logits
        close(model(**batch, logits_to_keep=kept).logits, whole[:, -kept:] if kept else whole)


def test_gemma4_reentrant_checkpoints_are_wrong_on_the_bare_model():
    """What tests/invariants leave out."""
    model, batch = tiny.build("gemma4").train(), batch_of("gemma4")
    labels = batch["input_ids"].masked_fill((batch["input_ids"] == IMG) | (batch["attention_mask"] == 0), -100)
    found = []
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        found.append(model.get_decoder().layers[0].self_attn.k_proj.weight.grad.clone())
    assert (found[0] - found[1]).abs().max() > 0.01


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


# -- models that are built in unusual ways ----------------------------------------------------------------------------
def built_like(name, **changes):
    """A tiny model whose config says something else about its vision tower than the tower is."""
    model = tiny.build(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    return model


FEATURES = [name for name in VLMS if hasattr(bare(name).config, "vision_feature_layer")]


@pytest.mark.parametrize("layer", [99, -99, [-1, 99], []])
@pytest.mark.parametrize("name", FEATURES)
def test_features_of_blocks_that_are_not_there(name, layer):
    """The model could not run either; compress() says so before it changes anything."""
    model = built_like(name, vision_feature_layer=layer)
    before = snapshot(model)
    for method in ("uniform", "fastervlm"):
        with pytest.raises(ValueError, match=r"vision_feature_layer=.*the vision tower has . blocks"):
            model.compress(method, ratio=0.4)
    assert_restored(model, before)


def test_attention_blocks_beyond_the_depth():
    """Qwen2.5-VL runs with indices of a deeper tower; those that exist count, and none is said to be none."""
    model = tiny.build("qwen2_5_vl")
    tower = model.model.visual
    full, depth = list(tower.fullatt_block_indexes), len(tower.blocks)
    batch = tiny.inputs("qwen2_5_vl", model)
    with model.compressed("fastervlm", ratio=0.5):
        expected = model(**batch).logits
    tower.fullatt_block_indexes = [*full, depth, 31]
    with model.compressed("fastervlm", ratio=0.5):
        assert torch.equal(model(**batch).logits, expected)
    tower.fullatt_block_indexes = [7, 31]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'fastervlm' reads 1 blocks.*has 0 that see.*use one of.*'divprune'"):
        model.compress("fastervlm", ratio=0.5)
    assert_restored(model, before)
    with model.compressed("divprune", ratio=0.5):
        greedy(model, batch)


@pytest.mark.parametrize("method", ["fastervlm", "fastv", "snapkv"])
def test_a_language_model_that_keeps_a_state(method):
    """Inside a supported architecture too: no stage can act on it."""
    text = LlavaConfig(
        text_config=Lfm2Config(
            vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, layer_types=["conv", "full_attention"],
        ),
        vision_config=bare("llava").config.vision_config,
        image_token_id=98,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(text)
    before = snapshot(model)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration around 'lfm2' cannot be compressed"):
        model.compress(method, ratio=0.25)
    assert_restored(model, before)
    model.config.text_config.model_type = "one_of_tomorrow"
    with pytest.raises(ValueError, match="some of its layers are of the type conv"):
        model.compress(method, ratio=0.25)


def test_a_stage_that_an_adapter_does_not_have(monkeypatch):
    """The refusal names the stages that it has, and the methods that work."""
    monkeypatch.setattr(type(adapter_of("llava")), "stages", ("vision",))
    model = tiny.build("llava")
    for method, stage in (("fastv", "decoder"), ("snapkv", "cache")):
        for names in (method, ["uniform", method]):
            with pytest.raises(ValueError, match=rf"'{method}' acts in the {stage} stage.*has vision only.*'divprune'"):
                model.compress(names, ratio=0.25)
    model.compress("uniform", ratio=0.25)
