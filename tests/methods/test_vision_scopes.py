"""What a vision method sees at a time: a crop, an image, a video or a sample, one toy per scope.

Crops and frames, budgets and choices are derived by hand for every sample alone; nothing of the engine is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hf_compress import budget
from hf_compress.methods.base import VisionMethod
from hf_compress.signals import Assignment
from hf_compress.tensors.draw import key
from hf_compress.tensors.select import top_by_part, top_sorted
from tests import tiny
from tests.architectures.helpers import next_turn
from tests.architectures.test_anyres import image_crops
from tests.architectures.test_tiles import PROMPTS, tiled
from tests.invariants.language import FullLength, bare, embed, short_logits
from tests.invariants.reference import alone, close, greedy, logits_of, shared, unchanged
from tests.tiny import FAMILIES, VID
from tests.toy import registered


@dataclass
class Loudest(VisionMethod):
    """The loudest tokens of all that it sees; notes what that is."""

    merging: bool = False
    seen: ClassVar[list] = []

    def assign(self, tokens, keep):
        norm = tokens.embeddings.float().norm(dim=-1)
        kept = top_sorted(norm, keep)
        self.seen.append(tokens)
        if not self.merging:
            return Assignment(kept)
        owner = (kept[:, None] <= torch.arange(tokens.count)[None, :, None]).sum(-1) - 1  # the one before
        return Assignment(kept, owner)


class LoudestOfImage(Loudest):
    """The same of an image with all its crops."""

    scope: ClassVar[str] = "image"


class LoudestOfVideo(Loudest):
    """The same of a video with all its frames."""

    scope: ClassVar[str] = "video"


class LoudestOfSample(Loudest):
    """The same of all images of a sample, then of all its videos."""

    scope: ClassVar[str] = "sample"


class Nowhere(Loudest):
    """Of a scope that there is not."""

    scope: ClassVar[str] = "page"


TOYS = {"crop": Loudest, "image": LoudestOfImage, "video": LoudestOfVideo, "sample": LoudestOfSample}
KINDS = [
    ("llava", "inputs"),
    ("llava_next", "inputs"),
    ("llava_onevision", "inputs"),
    ("llava_onevision", "video"),
    ("llava_next_video", "both"),
    ("video_llava", "both"),
    ("qwen2_5_vl", "video"),
    ("qwen2_vl", "both"),
    ("qwen3_vl", "video"),
    ("internvl", "tiles"),
    ("idefics3", "tiles"),
]
CASES = [pytest.param(*kind, scope, id="-".join([*kind, scope])) for kind in KINDS for scope in TOYS]


def batch_of(name, kind, side="left"):
    if kind == "tiles":
        prompt = PROMPTS[name]
        return tiled(name, [[1, 5, *prompt[1:]], [*prompt[:-2], 9]] if name not in tiny.PER_ROW else [prompt, prompt])
    return getattr(tiny, kind)(name, bare(name), side=side)


def pictures(name, kind, sample):
    """(modality, parts) per image, then per video: the columns of the tokens of every crop or frame."""
    images = FullLength(name, sample, sample["input_ids"][:, :1]).images(0)
    videos = len(tiny.video_tokens(name, sample))
    images, videos = images[: len(images) - videos], images[len(images) - videos :]
    if kind == "tiles":
        out = [("image", images[:3]), ("image", images[3:])]
    elif name in FAMILIES["anyres"] and images:
        crops, _ = image_crops(bare(name).config, sample["image_sizes"].tolist())
        out = [("image", [[rows[r] for r in c.rows] for c in crops if c.image == i]) for i, rows in enumerate(images)]
    else:
        out = [("image", [rows]) for rows in images]
    frames = sample["video_grid_thw"][:, 0].tolist() if "video_grid_thw" in sample else [tiny.FRAMES] * len(videos)
    for rows, t in zip(videos, frames):
        parts = [rows[i * (len(rows) // t) : (i + 1) * (len(rows) // t)] for i in range(t)]
        out.append(("video", [part[1:] for part in parts] if name == "video_llava" else parts))  # [CLS] is no token
    return out


def together(found, scope):
    """[(columns, how many stay)] of what is decided on at once, at half of the tokens."""
    out, samples = [], {}
    for modality, parts in found:
        sizes = [len(part) for part in parts]
        counts = budget.shares(round(sum(sizes) / 2), [float(n) for n in sizes], sizes)
        if scope == modality:
            out.append(([c for part in parts for c in part], sum(counts)))
        elif scope == "sample":
            columns, count = samples.get(modality, ([], 0))
            samples[modality] = (columns + [c for part in parts for c in part], count + sum(counts))
        else:
            out += list(zip(parts, counts))
    return out + list(samples.values())


def by_hand(name, kind, scope, sample, merging=False):
    """Columns that stay of one sample, and per column what stands there where others went into it."""
    x = embed(name, sample)[0]
    stay, vectors = set(range(len(x))), {}
    for columns, count in together(pictures(name, kind, sample), scope):
        kept = sorted(sorted(range(len(columns)), key=lambda i: -float(x[columns[i]].norm()))[:count])
        stay -= set(columns) - {columns[i] for i in kept}
        if merging:
            for i, end in zip(kept, [*kept[1:], len(columns)]):
                vectors[columns[i]] = x[columns[i:end]].mean(0)
    return sorted(stay), vectors


def expected(name, sample, tokens, stay, vectors):
    """Logits of the language model on the columns that stay."""
    images = FullLength(name, sample, sample["input_ids"][:, :1]).images(0)
    kept = [[i for i, row in enumerate(rows) if row in stay] for rows in images]
    x = embed(name, sample)[0]
    given = [
        torch.stack([vectors.get(rows[i], x[rows[i]]) for i in mine]) if mine else x[:0]
        for rows, mine in zip(images, kept)
    ]
    return short_logits(name, sample, tokens, kept, given)


@pytest.mark.parametrize("merging", [False, True])
@pytest.mark.parametrize(("name", "kind", "scope"), CASES)
def test_what_is_decided_on_at_once(name, kind, scope, merging):
    """A ragged, padded batch with two images per sample; every sample against a reference alone."""
    model, batch = shared(name), batch_of(name, kind)
    with registered(*TOYS.values()) as toys, model.compressed(toys[list(TOYS).index(scope)], 0.5, merging=merging):
        run, last = greedy(model, batch), model.compression.last
        for row in range(2):
            sample = alone(name, batch, row)
            stay, vectors = by_hand(name, kind, scope, sample, merging)
            padding = int((~batch["attention_mask"][row].bool()).sum())
            assert [c - padding for c in last.layer_index[0][row]] == stay
            if merging and name == "qwen3_vl":
                continue  # a merged token has its own DeepStack features: tests/architectures/test_qwen.py
            close(run.logits[row], expected(name, sample, run.tokens[row], stay, vectors))


@pytest.mark.parametrize("scope", TOYS)
@pytest.mark.parametrize(("name", "kind"), [("llava_next", "inputs"), ("qwen2_5_vl", "video"), ("llava", "inputs")])
def test_chunks_static_caches_beams_and_second_turns(name, kind, scope):
    model, batch = shared(name), batch_of(name, kind)
    with registered(*TOYS.values()) as toys, model.compressed(toys[list(TOYS).index(scope)], 0.5):
        run = greedy(model, batch)
        kept = model.compression.last.visual_kept
        second = turns(model, batch)
        assert torch.equal(greedy(model, batch, prefill_chunk_size=17).tokens, run.tokens)
        assert torch.equal(greedy(model, batch, cache_implementation="static").tokens, run.tokens)
        model.generate(**batch, max_new_tokens=2, num_beams=2, do_sample=False)
        assert model.compression.last.visual_kept == [mine for mine in kept for _ in range(2)]
        for row in range(2):
            assert torch.equal(turns(model, alone(name, batch, row))[0], second[row])


def turns(model, batch):
    run = greedy(model, batch)
    turn = next_turn(batch, run.out, [7, 8])
    return model.generate(**turn, past_key_values=run.cache, max_new_tokens=3, do_sample=False)[:, -3:]


@pytest.mark.parametrize("side", ["left", "right"])
def test_right_padding(side):
    """The same tokens stay whatever side the padding is on."""
    model, rows = shared("llava_next"), []
    with registered(*TOYS.values()), model.compressed("loudestofsample", 0.5):
        for way in ("left", side):
            logits_of(model, batch_of("llava_next", "inputs", way))
            rows.append(model.compression.last.visual_kept)
    assert rows[0] == rows[1]


def test_images_of_packed_samples_are_not_mixed():
    """Samples in one row are samples: two images, then one."""
    model = shared("llava")
    samples = [tiny.batch("llava", model, [prompt]) for prompt in ([1, tiny.IMG, 5, tiny.IMG, 7], [1, tiny.IMG, 8])]
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    packed = dict(
        input_ids=torch.cat([sample["input_ids"] for sample in samples], 1),
        pixel_values=torch.cat([sample["pixel_values"] for sample in samples]),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
    )
    with registered(*TOYS.values()), model.compressed("loudestofsample", 0.5):
        logits_of(model, packed, use_cache=False)
        rows = model.compression.last.layer_index[0][0]
    first = by_hand("llava", "inputs", "sample", samples[0])[0]
    second = by_hand("llava", "inputs", "sample", samples[1])[0]
    assert rows == [*first, *(lengths[0] + c for c in second)]


# -- what a sequence says about itself ---------------------------------------------------------------------------------
def views(name, kind, scope):
    """All that a toy saw of a batch, and the batch."""
    model, batch = shared(name), batch_of(name, kind)
    Loudest.seen.clear()
    with registered(*TOYS.values()) as toys, torch.no_grad(), model.compressed(toys[list(TOYS).index(scope)], 0.5):
        model(**batch)
    return Loudest.seen, batch


@pytest.mark.parametrize(("name", "kind", "scope"), CASES)
def test_places(name, kind, scope):
    """Every token of every part is there once, row by row; ordinals are those of the sample."""
    seen, batch = views(name, kind, scope)
    found = [pictures(name, kind, alone(name, batch, row)) for row in range(2)]
    every, sizes = [], [len(part) for mine in found for _, parts in mine for part in parts]
    for tokens in seen:
        place, image = tokens.place, tokens.image
        assert place.shape == (len(tokens), tokens.count, 3) and image.shape == place.shape[:2]
        for mine, ordinals in zip(place.tolist(), image.tolist()):
            at = 0
            parts = sorted({p for p, _, _ in mine})
            assert len(parts) == len(tokens.grids)
            for part, (h, w) in zip(parts, tokens.grids):
                assert mine[at : at + h * w] == [[part, r, c] for r in range(h) for c in range(w)]
                assert len({*ordinals[at : at + h * w]}) == 1
                every.append((ordinals[at], h * w))
                at += h * w
            assert at == tokens.count
            assert scope == "sample" or len({*ordinals}) == 1
    assert sorted(n for _, n in every) == sorted(sizes)
    ordinals = []  # images of a sample come first, then its videos
    for mine in found:
        ordinals += [(i, len(part)) for i, (_, parts) in enumerate(mine) for part in parts]
    assert sorted(every) == sorted(ordinals)


def test_boxes_of_crops():
    """A grid of tiles over the image; what unpadding takes away is not of the image."""
    seen, _ = views("llava_next", "inputs", "image")
    found = {tuple(tokens.grids): tokens.boxes for tokens in seen}
    whole = (0.0, 0.0, 1.0, 1.0)
    assert all(boxes[0] == whole for boxes in found.values())
    for grids, boxes in found.items():
        for (h, w), (top, left, bottom, right) in zip(grids[1:], boxes[1:]):
            canvas = h / (bottom - top), w / (right - left)
            assert all(side == pytest.approx(round(side)) for side in canvas)
        area = sum((bottom - top) * (right - left) for top, left, bottom, right in boxes[1:])
        assert area == pytest.approx(1)  # tiles lie side by side, and are all there
    assert any(len(boxes) == 5 and (0.5, 0.5, 1.0, 1.0) in boxes for boxes in found.values())
    seen, _ = views("internvl", "tiles", "image")
    with pytest.raises(ValueError, match=r"loudestofimage.*tiles of a picture"):
        [tokens.boxes for tokens in seen]


def test_grid_of_several_parts_is_not_one():
    (tokens,) = views("qwen2_5_vl", "video", "video")[0][:1]
    assert len(tokens.grids) > 1
    with pytest.raises(ValueError):
        tokens.grid  # noqa: B018


def test_content_of_a_sequence_is_that_of_its_parts():
    """So that what is drawn for a sample does not depend on what it is batched with."""
    one, batch = views("llava_next", "inputs", "sample")
    together_ = torch.cat([tokens.content for tokens in one])
    assert len({*together_.tolist()}) == 2
    model, separate = shared("llava_next"), []
    for row in range(2):
        Loudest.seen.clear()
        with registered(*TOYS.values()), torch.no_grad(), model.compressed("loudestofsample", 0.5):
            model(**alone("llava_next", batch, row))
        separate += Loudest.seen[0].content.tolist()
    assert sorted(separate) == sorted(together_.tolist())
    assert key(together_).shape == (2,)


def test_features_and_signals_are_those_of_the_parts():
    seen, _ = views("llava_next", "inputs", "image")
    single, _ = views("llava_next", "inputs", "crop")
    alike = {tuple(row): None for tokens in single for x in tokens.features for row in x.tolist()}
    for tokens in seen:
        assert tokens.features.shape[:2] == (len(tokens), tokens.count)
        assert all(tuple(row) in alike for x in tokens.features for row in x.tolist())


# -- helper and refusals -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_top_by_part(seed):
    g = torch.Generator().manual_seed(seed)
    n, N, P = (int(torch.randint(1, most, (), generator=g)) for most in (4, 30, 6))
    score = torch.randint(0, 5, (n, N), generator=g).float()  # with ties
    part = torch.randint(0, P, (n, N), generator=g)
    size = torch.stack([(part == p).sum(1) for p in range(P)], 1)
    counts = (torch.rand(n, P, generator=g) * (size + 1)).long()
    found = top_by_part(score, part, counts)
    for b in range(n):
        for p in range(P):
            mine = [i for i in range(N) if part[b, i] == p]
            best = sorted(mine, key=lambda i: (-float(score[b, i]), i))[: int(counts[b, p])]
            assert [i for i in mine if found[b, i]] == sorted(best)


def test_scopes_that_there_are_not():
    model = shared("llava")
    with registered(Nowhere), unchanged(model), pytest.raises(ValueError, match=r"scope='page'.*'crop', 'image'"):
        model.compress("nowhere", 0.5)


def test_places_are_needed_where_they_are_known():
    with registered(LoudestOfImage, needs=("visual", "places")):
        for name in ("llava", "llava_next", "qwen2_5_vl"):
            with shared(name).compressed("loudestofimage", 0.5):
                pass
        for name in ("internvl", "idefics3", "aya_vision"):
            with pytest.raises(ValueError, match="needs crops whose places"):
                shared(name).compress("loudestofimage", 0.5)


def test_ready_made_features_have_scopes_too():
    """A video that was encoded elsewhere is told from an image."""
    model, batch = shared("qwen2_5_vl"), batch_of("qwen2_5_vl", "video")
    features = bare("qwen2_5_vl", "sdpa").base_model.get_video_features(
        batch["pixel_values_videos"], batch["video_grid_thw"], return_dict=True
    )
    rest = {k: v for k, v in batch.items() if k != "pixel_values_videos"}
    assert (batch["input_ids"] == VID).any()
    with registered(*TOYS.values()), torch.no_grad(), model.compressed("loudestofvideo", 0.5):
        model(**batch)
        kept = model.compression.last.visual_kept
        model(**rest, mm_encoder_outputs={"video": features})
        assert model.compression.last.visual_kept == kept
