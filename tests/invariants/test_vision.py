"""Invariants 4 and 9: a vision method equals the language model on embeddings shortened by hand, chunked or static."""

import pytest
import torch

import hf_compress
from hf_compress.methods.base import PixelMethod, TowerMethod
from tests import tiny
from tests.invariants.merging import Spy, entered_by_hand, merged_by_hand, resized_by_hand, tower_by_hand
from tests.invariants.reference import (
    VLMS,
    FullLength,
    adapter_of,
    alone,
    bare,
    batch_of,
    close,
    compressed,
    greedy,
    kernels,
    logits_of,
    looks,
    matrix,
    mrope,
    shared,
    short_logits,
    windows,
)

SELECTIONS = ["fastervlm", "divprune"]
TELLING = ["llava_mini"]  # they add to text, which static caches are given as ids


@kernels("vision")
def test_equals_embeddings_shortened_by_hand(method, name, attn, monkeypatch):
    """At every greedy step of a ragged, padded batch with a cache; each row against an uncached reference alone."""
    model, batch, adapter = shared(name, attn), batch_of(name), adapter_of(name)
    with compressed(model, method):
        run, last = greedy(model, batch), model.compression.last
        installed = model.compression.context.vision_method
        inside = isinstance(installed, TowerMethod) and "tower" in adapter.gives
        for row in range(2):
            sample, kept, given = alone(name, batch, row), last.visual_kept[row], {}
            with monkeypatch.context() as patch:
                verb = "assign" if not inside else "admit" if installed.admits else "reduce"
                spy = Spy(patch, installed, verb)
                logits_of(model, sample)
            if isinstance(installed, PixelMethod) and adapter.resizable:
                given = resized_by_hand(name, sample, installed, lambda n: round(n / 2))
            elif inside and installed.admits:
                stay = [row.nonzero()[:, 0].tolist() for _, stays in spy.calls for row in stays]
                assert sorted(kept) == sorted(stay)  # images of one size are asked about together
                given = entered_by_hand(name, sample, kept)
            elif adapter.crops:  # an image is several crops and newlines, for which test_anyres.py does the same
                assert kept == model.compression.last.visual_kept[0]
                if any(assignment.merges or images.made is not None for images, assignment in spy.calls):
                    continue
            else:
                by_hand, given = (tower_by_hand if inside else merged_by_hand)(name, sample, spy.calls)
                assert kept == by_hand
            close(run.logits[row], short_logits(name, sample, run.tokens[row], kept, **given))


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("name", VLMS)
@pytest.mark.parametrize("method", SELECTIONS)
def test_positions_knob(method, name, positions):
    """Both kinds of positions on 1-D rotary embeddings; only without a window are gaps defined by short_logits."""
    model, batch = shared(name), batch_of(name)
    if positions == "renumber" and mrope(name):
        with pytest.raises(ValueError, match="positions='renumber' has no meaning"):
            model.compress(method, ratio=0.5, positions=positions)
        return
    if any(windows(name)) and positions == "original":
        return windows_over_gaps(name, model, batch, method)
    with compressed(model, method, positions=positions):
        run, last = greedy(model, batch), model.compression.last
    for row in range(2):
        sample = alone(name, batch, row)
        expected = short_logits(name, sample, run.tokens[row], last.visual_kept[row], positions=positions)
        close(run.logits[row], expected)


def windows_over_gaps(name, model, batch, method):
    """With original positions a window is measured in the caller's rows: the full-length model says what is right."""
    with compressed(model, method, positions="original"):
        run, last = greedy(model, batch), model.compression.last
    full = FullLength(name, batch, run.tokens)
    kept = full.columns(last.layer_index[0])[:, None, None]
    close(run.logits, full.logits([full.causal(i) & kept for i in range(full.layers)]))


@pytest.mark.parametrize("kind", ["inputs", "mixed", "edges", "equal", "text_only"])
@matrix("vision")
def test_forward_equals_the_short_model(method, name, kind):
    """Logits of one forward come back at the caller's length: a removed row repeats its last surviving predecessor."""
    model, batch = shared(name), batch_of(name, kind)
    with compressed(model, method):
        got, last = logits_of(model, batch), model.compression.last
        run = greedy(model, batch)
    assert got.shape[:2] == batch["input_ids"].shape
    close(got[:, -1], run.logits[:, 0])
    for b, rows in enumerate(last.layer_index[0]):
        alive = 0
        for row in range(rows[0], got.shape[1]):
            alive = row if row in rows else alive
            assert torch.equal(got[b, row], got[b, alive])


# In these prompts rows see ahead: a chunk that ends inside of a block is another prompt, on the bare model too.
BOTH_WAYS = ["gemma3", "paligemma"]
# Chunks of a ragged batch would put fillers behind a state: refused, see tests/architectures/test_hybrids.py.
CAUSAL = [name for name in VLMS if name not in (*BOTH_WAYS, *tiny.HYBRIDS)]


@pytest.mark.parametrize("name", VLMS)
def test_chunks_of_the_bare_model(name):
    """What the tests below rely on, and why they leave two models out."""
    model, batch = bare(name, "sdpa"), batch_of(name)
    whole, chunked = greedy(model, batch), greedy(model, batch, prefill_chunk_size=5)
    if name in BOTH_WAYS:
        assert (chunked.logits[:, 0] - whole.logits[:, 0]).abs().max() > 0.1
    else:
        close(chunked.logits, whole.logits)


def whole_prompts_only(model, method, batch, **how):
    """Methods that read the language model need all of a prompt at once, and say so."""
    why = "reads? no layer of the language model"
    with compressed(model, method), pytest.raises(ValueError, match=why):
        greedy(model, batch, **how)


@pytest.mark.parametrize("kind", ["inputs", "edges"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_chunks_of_one_row(name, kind):
    """They may be an image's, too, and are cut like others; `edges` ends with a row of an image that stays."""
    model, batch = shared(name), batch_of(name, kind)
    with compressed(model, "uniform"):
        whole, kept = greedy(model, batch), model.compression.last.visual_kept
        chunked = greedy(model, batch, prefill_chunk_size=1)
        assert [list(map(list, row)) for row in model.compression.last.visual_kept] == kept
    close(chunked.logits, whole.logits)
    assert chunked.cache.get_seq_length() == whole.cache.get_seq_length()


def test_a_last_chunk_of_which_nothing_is_kept_is_refused():
    model, batch = shared("qwen2_5_vl"), batch_of("qwen2_5_vl", "edges")
    with compressed(model, "m3"), pytest.raises(ValueError, match=r"ends with an image.*last 6 rows"):
        greedy(model, batch, prefill_chunk_size=7)


@pytest.mark.parametrize("chunk", [5, 16])
@matrix("before", CAUSAL)
def test_chunked_prefill_is_whole_prefill(method, name, chunk):
    model, batch = shared(name), batch_of(name)
    if looks(method):
        return whole_prompts_only(model, method, batch, prefill_chunk_size=chunk)
    with compressed(model, method):
        whole = greedy(model, batch)
        chunked = greedy(model, batch, prefill_chunk_size=chunk)
        again = greedy(model, batch)
    close(chunked.logits, whole.logits)
    assert torch.equal(chunked.tokens, whole.tokens)
    assert torch.equal(again.logits, whole.logits)  # nothing stays of the chunks


@matrix("before", CAUSAL)
def test_chunks_of_which_nothing_is_kept(method, name):
    """One token per image: whole chunks vanish, in one row of the batch or in all."""
    model = shared(name)
    if looks(method):
        return whole_prompts_only(model, method, batch_of(name), prefill_chunk_size=4)
    for kind in ("inputs", "equal"):
        batch = batch_of(name, kind)
        with compressed(model, method, keep=1):
            whole, chunked = greedy(model, batch), greedy(model, batch, prefill_chunk_size=4)
        close(chunked.logits, whole.logits)


@pytest.mark.parametrize("kind", ["inputs", "mixed", "text_only"])
@matrix("before")
def test_static_cache_is_dynamic_cache(method, name, kind):
    model, batch = shared(name), batch_of(name, kind)
    if looks(method):
        return whole_prompts_only(model, method, batch, cache_implementation="static")
    if method in TELLING and kind != "text_only":
        with compressed(model, method), pytest.raises(ValueError, match=r"adds to the text.*dynamic cache"):
            greedy(model, batch, cache_implementation="static")
        return
    with compressed(model, method):
        dynamic = greedy(model, batch)
        kept = model.compression.last.visual_kept
        static = greedy(model, batch, cache_implementation="static")
        assert [list(map(list, row)) for row in model.compression.last.visual_kept] == kept
        again = greedy(model, batch)
    close(static.logits, dynamic.logits)
    assert torch.equal(static.out.sequences, dynamic.out.sequences)
    assert torch.equal(again.logits, dynamic.logits)


@pytest.mark.parametrize("name", VLMS)
def test_static_cache_counts_as_before(name):
    """max_length and the streamer are in the caller's length, as with the default cache."""
    model, batch = shared(name), batch_of(name, "equal")
    length = batch["input_ids"].shape[1]

    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.tolist())

        def end(self):
            self.seen.append("end")

    seen = {}
    with compressed(model, "fastervlm"):
        for kind in (None, "static"):
            streamer = Streamer()
            common = dict(do_sample=False, suppress_tokens=[tiny.IMG, tiny.VID], cache_implementation=kind)
            out = model.generate(**batch, max_length=length + 3, streamer=streamer, **common)
            assert out.shape[1] == length + 3
            seen[kind] = (out.tolist(), streamer.seen)
    assert seen[None][1][0] == batch["input_ids"].tolist()
    assert seen["static"] == seen[None]


@pytest.mark.parametrize("name", VLMS)
@pytest.mark.parametrize("method", ["fastervlm", "visionzip"])
def test_features_computed_by_the_caller(method, name):
    """get_image_features() first, mm_encoder_outputs later: the same as pixel_values."""
    model, batch = shared(name), batch_of(name)
    pixels, rest = tiny.encoder_inputs(batch), {k: v for k, v in batch.items() if not k.startswith("pixel_")}
    with compressed(model, method):
        expected = logits_of(model, batch)
        with torch.no_grad():
            features = model.base_model.get_image_features(**pixels, return_dict=True)
        got = logits_of(model, rest, mm_encoder_outputs={"image": features})
    close(got, expected)


@pytest.mark.parametrize("name", VLMS)
def test_features_from_elsewhere(name):
    """Encoder outputs of another model: fine where the method needs the embeddings only, refused where it reads the
    tower."""
    model, batch = shared(name), batch_of(name)
    pixels, rest = tiny.encoder_inputs(batch), {k: v for k, v in batch.items() if not k.startswith("pixel_")}
    with torch.no_grad():
        features = bare(name, "sdpa").base_model.get_image_features(**pixels, return_dict=True)
    with compressed(model, "divprune"):
        close(logits_of(model, rest, mm_encoder_outputs={"image": features}), logits_of(model, batch))
    with compressed(model, "fastervlm"), pytest.raises(ValueError, match=r"(?s)fastervlm.*mm_encoder_outputs"):
        logits_of(model, rest, mm_encoder_outputs={"image": features})


def test_every_vision_method_is_covered():
    assert len(hf_compress.methods("vision")) >= 9
