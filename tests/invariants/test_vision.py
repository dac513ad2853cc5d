"""Invariants 4 and 9: a vision method equals the language model on embeddings shortened by hand, chunked or static."""

import pytest
import torch
import torch.nn.functional as F

import hf_compress
from hf_compress.methods.base import PixelMethod, TowerMethod
from tests import tiny
from tests.invariants.reference import (
    alone,
    bare,
    batch_of,
    close,
    compressed,
    greedy,
    image_embeddings,
    kernels,
    logits_of,
    matrix,
    mixing,
    shared,
    short_logits,
)
from tests.tiny import VISION

WINDOWED = [*VISION, "llava_window"]
SELECTIONS = ["fastervlm", "divprune"]


class Spy:
    """Records what a method answers while it is in place."""

    def __init__(self, monkeypatch, method, verb):
        self.calls = []
        original = getattr(method, verb)

        def noted(subject, keep):
            answer = original(subject, keep)
            self.calls.append((subject, answer))
            return answer

        monkeypatch.setattr(method, verb, noted, raising=False)


def merged_by_hand(name, sample, spy, tower):
    """What stands at the kept places per image, from the recorded decisions alone: (kept, vectors)."""
    if tower:
        return tower_by_hand(name, sample, [answer for _, answer in spy.calls])
    count = len(image_embeddings(name, sample))
    kept, vectors = [None] * count, [None] * count
    for images, assignment in spy.calls:
        for row, ordinal in enumerate(images.index):
            x, project = projector_input(name, sample, ordinal)
            W = mixing(assignment, row, len(x))
            if assignment.before_projector:
                vectors[ordinal] = project(W @ x)
            else:
                vectors[ordinal] = W @ image_embeddings(name, sample)[ordinal]
            kept[ordinal] = assignment.kept[row].tolist()
    return kept, vectors


@torch.no_grad()
def projector_input(name, sample, image):
    """(N, Dv) what the projector of the bare model reads for one image in reading order, and the projector."""
    model, seen = bare(name, "sdpa").model, []
    projector = model.visual.merger if name == "qwen2_5_vl" else model.multi_modal_projector
    handle = projector.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        expected = image_embeddings(name, sample)[image]
    finally:
        handle.remove()
    x, out = seen[0]
    if name != "qwen2_5_vl":
        return x[image], lambda y: projector(y[None])[0]
    order = [int((out == row).all(1).nonzero()[0]) for row in expected]  # the tower works in window order
    x = x.reshape(len(out), -1)
    return x[order], lambda y: projector(y.reshape(-1, x.shape[1] // 4))


@torch.no_grad()
def tower_by_hand(name, sample, steps):
    """The CLIP tower block by block: after the attention of each, `steps` says how its tokens become fewer."""
    model = bare(name, "sdpa").model
    tower, pixels = model.vision_tower, sample["pixel_values"]
    count, blocks = len(pixels), tower.encoder.layers[:-1]  # features of the last but one block
    assert len(steps) == len(blocks)
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    whole = torch.eye(x.shape[1]).expand(count, -1, -1)
    for block, step in zip(blocks, steps):
        a, y = block.self_attn, block.layer_norm1(x)
        q, k, v = (proj(y).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for proj in (a.q_proj, a.k_proj, a.v_proj))
        size = (whole > 0).sum(-1)
        weights = (q @ k.mT * a.head_dim**-0.5 + size.log()[:, None, None]).softmax(-1)
        x = x + a.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if step is not None:
            W = torch.stack([mixing(step, i, x.shape[1]) for i in range(count)])
            x, whole = W @ x, W @ whole
        x = x + block.mlp(block.layer_norm2(x))
    kept, vectors = [], []
    for i in range(count):
        first = [int(row.nonzero()[0]) for row in whole[i]]  # a merged token stands where its first member stood
        order = sorted(range(1, len(first)), key=first.__getitem__)
        kept.append([first[j] - 1 for j in order])
        vectors.append(model.multi_modal_projector(x[i, order][None])[0])
    return kept, vectors


@torch.no_grad()
def resized_by_hand(sample, method, keep):
    """Embeddings of every image of a Qwen sample after its pixels were resized, patch by patch."""
    m, p, out = tiny.QWEN_MERGE, tiny.PATCH, []
    patches = sample["pixel_values"].split(sample["image_grid_thw"].prod(-1).tolist())
    for rows, (_, h, w) in zip(patches, sample["image_grid_thw"].tolist()):
        new = method.resize((h // m, w // m), keep(h * w // m**2))
        image = torch.zeros(2, 3, h * p, w * p)
        for row, (y, x) in zip(rows, patch_corners(h, w)):
            image[:, :, y : y + p, x : x + p] = row.view(3, 2, p, p).transpose(0, 1)
        size = (new[0] * m * p, new[1] * m * p)
        small = F.interpolate(image, size, mode="bicubic", antialias=True)
        flat = [
            small[:, :, y : y + p, x : x + p].transpose(0, 1).flatten()
            for y, x in patch_corners(new[0] * m, new[1] * m)
        ]
        grid = torch.tensor([[1, new[0] * m, new[1] * m]])
        visual = bare("qwen2_5_vl", "sdpa").model.get_image_features
        out.append(visual(pixel_values=torch.stack(flat), image_grid_thw=grid, return_dict=True).pooler_output[0])
    return out


def patch_corners(h, w):
    """Pixel corners of the patches of an image in the order of the processor: 2 x 2 groups, row by row."""
    m, p = tiny.QWEN_MERGE, tiny.PATCH
    return [
        ((gy * m + y) * p, (gx * m + x) * p)
        for gy in range(h // m)
        for gx in range(w // m)
        for y in range(m)
        for x in range(m)
    ]


@kernels("vision", WINDOWED)
def test_equals_embeddings_shortened_by_hand(method, name, attn, monkeypatch):
    """At every greedy step of a ragged, padded batch with a cache; each row against an uncached reference alone."""
    model, batch = shared(name, attn), batch_of(name)
    with compressed(model, method):
        run, last = greedy(model, batch), model.compression.last
        installed = model.compression.vision
        tower = isinstance(installed, TowerMethod) and name != "qwen2_5_vl"
        for row in range(2):
            sample, kept, vectors = alone(name, batch, row), last.visual_kept[row], None
            if isinstance(installed, PixelMethod) and name == "qwen2_5_vl":
                vectors = resized_by_hand(sample, installed, lambda n: round(n / 2))
            else:
                with monkeypatch.context() as patch:
                    spy = Spy(patch, installed, "reduce" if tower else "assign")
                    logits_of(model, sample)
                by_hand, vectors = merged_by_hand(name, sample, spy, tower)
                assert kept == by_hand
            close(run.logits[row], short_logits(name, sample, run.tokens[row], kept, vectors))


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize("name", ["llava", "llava_window"])
@pytest.mark.parametrize("method", SELECTIONS)
def test_positions_knob(method, name, positions):
    """Both kinds of positions on 1-D rotary embeddings; only without a window are gaps defined by short_logits."""
    model, batch = shared(name), batch_of(name)
    if name == "llava_window" and positions == "original":
        return windows_over_gaps(model, batch, method)
    with compressed(model, method, positions=positions):
        run, last = greedy(model, batch), model.compression.last
    for row in range(2):
        sample = alone(name, batch, row)
        expected = short_logits(name, sample, run.tokens[row], last.visual_kept[row], positions=positions)
        close(run.logits[row], expected)


def windows_over_gaps(model, batch, method):
    """With original positions a window is measured in the caller's rows: the full-length model says what is right."""
    from tests.invariants.reference import FullLength

    with compressed(model, method, positions="original"):
        run, last = greedy(model, batch), model.compression.last
    full = FullLength("llava_window", batch, run.tokens)
    kept = full.columns(last.layer_index[0])[:, None, None]
    close(run.logits, full.logits([full.causal(i) & kept for i in range(full.layers)]))


@pytest.mark.parametrize("kind", ["inputs", "mixed", "edges", "equal", "text_only"])
@matrix("vision", VISION)
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


@pytest.mark.parametrize("chunk", [5, 16])
@matrix("vision", VISION)
def test_chunked_prefill_is_whole_prefill(method, name, chunk):
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        whole = greedy(model, batch)
        chunked = greedy(model, batch, prefill_chunk_size=chunk)
        again = greedy(model, batch)
    close(chunked.logits, whole.logits)
    assert torch.equal(chunked.tokens, whole.tokens)
    assert torch.equal(again.logits, whole.logits)  # nothing stays of the chunks


@matrix("vision", VISION)
def test_chunks_of_which_nothing_is_kept(method, name):
    """One token per image: whole chunks vanish, in one row of the batch or in all."""
    model = shared(name)
    for kind in ("inputs", "equal"):
        batch = batch_of(name, kind)
        with compressed(model, method, keep=5 if method == "tome" else 1):
            whole, chunked = greedy(model, batch), greedy(model, batch, prefill_chunk_size=4)
        close(chunked.logits, whole.logits)


@pytest.mark.parametrize("kind", ["inputs", "mixed", "text_only"])
@matrix("vision", VISION)
def test_static_cache_is_dynamic_cache(method, name, kind):
    model, batch = shared(name), batch_of(name, kind)
    with compressed(model, method):
        dynamic = greedy(model, batch)
        kept = model.compression.last.visual_kept
        static = greedy(model, batch, cache_implementation="static")
        assert [list(map(list, row)) for row in model.compression.last.visual_kept] == kept
        again = greedy(model, batch)
    close(static.logits, dynamic.logits)
    assert torch.equal(static.out.sequences, dynamic.out.sequences)
    assert torch.equal(again.logits, dynamic.logits)


@pytest.mark.parametrize("name", VISION)
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


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("method", ["fastervlm", "visionzip"])
def test_features_computed_by_the_caller(method, name):
    """get_image_features() first, mm_encoder_outputs later: the same as pixel_values."""
    model, batch = shared(name), batch_of(name)
    pixels = {k: batch[k] for k in ("pixel_values", "image_grid_thw") if k in batch}
    rest = {k: v for k, v in batch.items() if k != "pixel_values"}
    with compressed(model, method):
        expected = logits_of(model, batch)
        with torch.no_grad():
            features = model.model.get_image_features(**pixels, return_dict=True)
        got = logits_of(model, rest, mm_encoder_outputs={"image": features})
    close(got, expected)


@pytest.mark.parametrize("name", VISION)
def test_features_from_elsewhere(name):
    """Encoder outputs of another model: fine where the method needs the embeddings only, refused where it reads the
    tower."""
    model, batch = shared(name), batch_of(name)
    pixels = {k: batch[k] for k in ("pixel_values", "image_grid_thw") if k in batch}
    rest = {k: v for k, v in batch.items() if k != "pixel_values"}
    with torch.no_grad():
        features = bare(name, "sdpa").model.get_image_features(**pixels, return_dict=True)
    with compressed(model, "divprune"):
        close(logits_of(model, rest, mm_encoder_outputs={"image": features}), logits_of(model, batch))
    with compressed(model, "fastervlm"), pytest.raises(ValueError, match=r"(?s)fastervlm.*mm_encoder_outputs"):
        logits_of(model, rest, mm_encoder_outputs={"image": features})


def test_every_vision_method_is_covered():
    assert len(hf_compress.methods("vision")) >= 9
