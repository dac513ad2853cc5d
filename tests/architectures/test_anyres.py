"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision on images: crops, unpadding, newlines, interpolation.

Crops, scores and the language model's answers are derived by hand here; nothing of the adapters is used for them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import select_best_resolution

import hf_compress
from hf_compress import budget
from hf_compress.tensors.select import spaced_grid
from tests import tiny
from tests.tiny import GREEDY, IMG, VID

NAMES = tiny.FAMILIES["anyres"]
SIDE = tiny.LLAVA_SIDE // tiny.PATCH
N = SIDE * SIDE
SIGNALS = {"fastervlm": {}, "vtc_cls": {"layers": 2}, "visionzip": {}}
METHODS = SIGNALS | {"divprune": {}, "tome": {}, "avgpool": {}, "downsample": {}}
TOLERANCE = 5e-5  # logits have a standard deviation of about 1.7; padding alone moves them by up to 2e-5


@dataclass
class Crop:
    """A crop of an image (a frame of a video): its tokens and where they stand among the rows of the image."""

    image: int
    crop: int
    tokens: list[int]
    rows: list[int]
    grid: tuple[int, int]


def image_crops(config, sizes, grouped=False):
    """Crops of all images, token by token, and the number of rows of each image."""
    out, lengths, at = [], [], 0
    for image, (h, w) in enumerate(sizes):
        best = select_best_resolution((h, w), config.image_grid_pinpoints)
        tiles_h, tiles_w = (0, 0) if grouped else (best[0] // tiny.LLAVA_SIDE, best[1] // tiny.LLAVA_SIDE)
        out.append(Crop(image, at, list(range(N)), list(range(N)), (SIDE, SIDE)))
        H, W = tiles_h * SIDE, tiles_w * SIDE
        top = left = 0
        if H and w / h > W / H:
            top = (H - int(round(h * W / w, 7))) // 2
        elif H:
            left = (W - int(round(w * H / h, 7))) // 2
        row, found = N, {}
        for y in range(top, H - top):
            for x in range(left, W - left):
                tokens, rows = found.setdefault(1 + y // SIDE * tiles_w + x // SIDE, ([], []))
                tokens.append(y % SIDE * SIDE + x % SIDE)
                rows.append(row)
                row += 1
            row += 1  # newline
        for crop, (tokens, rows) in sorted(found.items()):
            height = len({t // SIDE for t in tokens})
            out.append(Crop(image, at + crop, tokens, rows, (height, len(tokens) // height)))
        lengths.append(row + (1 if not H else 0))
        at += 1 + tiles_h * tiles_w
    return out, lengths


def budgets(crops, ratio):
    """Tokens per crop: the exact count of every image, shared over its crops."""
    out = []
    for image in sorted({c.image for c in crops}):
        sizes = [len(c.tokens) for c in crops if c.image == image]
        out += budget.shares(budget.kept(sum(sizes), ratio), [float(n) for n in sizes], sizes)
    return out


def columns(sample, token, lengths, crops, chosen):
    """Columns of one unpadded prompt that stay: everything but the tokens of the crops that were not chosen."""
    places = (sample["input_ids"][0] == token).nonzero()[:, 0].tolist()
    assert len(places) == sum(lengths)
    stay = set(range(sample["input_ids"].shape[1]))
    for crop, picks in zip(crops, chosen):
        start = sum(lengths[: crop.image])
        stay -= {places[start + r] for r in crop.rows}
        stay |= {places[start + crop.rows[p]] for p in picks}
    return sorted(stay)


@contextlib.contextmanager
def untouched(model):
    """The block leaves no hook, no attribute and no changed weight behind."""

    def look():
        mark = lambda value: len(value) if hasattr(value, "__len__") else id(value)
        marks = {path: {k: mark(v) for k, v in vars(m).items()} for path, m in model.named_modules()}
        return marks, model.config.to_json_string(), {k: v.clone() for k, v in model.state_dict().items()}

    before = look()
    yield
    after = look()
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][k], v) for k, v in before[2].items())


def greedy(model, batch, **kwargs):
    out = model.generate(**batch, **(GREEDY | kwargs), return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def alive(model):
    """Per sample the columns of the last prompt that entered the language model."""
    return model.compression.last.layer_index[0]


def close(a, b):
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def embed(bare, sample, ids):
    """(1, L, D) with images and videos in place, from a model that nobody compressed."""
    x = bare.get_input_embeddings()(ids)
    for token, modality in ((IMG, "image"), (VID, "video")):
        if (ids == token).any():
            encode = getattr(bare.model, f"get_{modality}_features")
            out = encode(**tiny.encoder_inputs(sample, modality), return_dict=True).pooler_output
            x[ids == token] = torch.cat(list(out)).view(-1, x.shape[-1])
    return x


@torch.no_grad()
def short_logits(bare, sample, tokens, stay, vectors=None):
    """(T, V): the language model, uncached, on the embeddings of some columns; `vectors` {column: embedding}."""
    whole = torch.cat([sample["input_ids"], tokens[None, :-1]], 1)
    x = embed(bare, sample, whole)
    for column, vector in (vectors or {}).items():
        x[0, column] = vector
    stay = [*stay, *range(sample["input_ids"].shape[1], whole.shape[1])]
    at = torch.arange(len(stay))[None]
    mask = torch.ones_like(at)
    out = bare.get_decoder()(inputs_embeds=x[:, stay], position_ids=at, attention_mask=mask, use_cache=False)
    return bare.lm_head(out.last_hidden_state)[0, -len(tokens) :]


@torch.no_grad()
def scores(name, tower, pixels):
    """(crops, N): what [CLS] attends to in the block of the features; without [CLS] the attention received there."""
    maps = tower(pixels, output_attentions=True).attentions
    return maps[-1].mean((1, 2)) if name == "llava_onevision" else maps[-2][:, :, 0, 1:].mean(1)


def tower_pixels(sample, crops):
    """(crops, 3, H, W): the crops of all images as the tower reads them."""
    ends = {c.image: c.crop + 1 for c in crops}
    starts = {c.image: c.crop for c in reversed(crops)}
    counts = [ends[i] - starts[i] for i in sorted(ends)]
    return torch.cat([p[:n] for p, n in zip(sample["pixel_values"], counts)])


def top(values, k):
    return values.topk(k).indices.sort().values.tolist()


@torch.no_grad()
def projected(bare, sample, modality):
    """What the projector reads and gives, of all crops or frames."""
    seen = []
    handle = bare.model.multi_modal_projector.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    getattr(bare.model, f"get_{modality}_features")(**tiny.encoder_inputs(sample, modality), return_dict=True)
    handle.remove()
    return seen


class Spy:
    """Notes what a vision method was shown and answered."""

    def __init__(self, monkeypatch, method):
        self.calls, assign = [], method.assign

        def noted(images, keep):
            self.calls.append((images, assign(images, keep)))
            return self.calls[-1][1]

        monkeypatch.setattr(method, "assign", noted)


def matrix(assignment, row, tokens):
    """(K, N): an Assignment written out."""
    W = torch.zeros(assignment.kept.shape[1], tokens)
    for j in range(tokens):
        if (k := int(assignment.groups[row, j])) >= 0:
            W[k, j] = 1.0 if assignment.weight is None else assignment.weight[row, j]
    return W if assignment.weight is not None else W / W.sum(1, keepdim=True)


@pytest.mark.parametrize("size", [(48, 48), (40, 30), (20, 48), (10, 47), (47, 13)])
@pytest.mark.parametrize("name", NAMES)
def test_units_are_the_crops(name, size):
    """Every row of an image is the token of a crop that the adapter says, bit for bit, or a newline."""
    check_units(tiny.build(name), [size, (48, 24)])


@pytest.mark.parametrize("name", NAMES)
def test_tiles_of_padding_alone_are_no_units(name):
    model = tiny.build(name)
    model.config.image_grid_pinpoints = [[24, 72]]
    units = check_units(model, [(48, 24)])
    assert [(u.crop, u.grid) for u in units] == [(0, (6, 6)), (2, (6, 4))]


@torch.no_grad()
def check_units(model, sizes):
    seen = []
    model.model.multi_modal_projector.register_forward_hook(lambda _, args, out: seen.append(out))
    batch = dict(pixel_values=torch.randn(len(sizes), 5, 3, 24, 24), image_sizes=torch.tensor(sizes))
    images = model.model.get_image_features(**batch, return_dict=True).pooler_output
    adapter = hf_compress.architectures()[model.config.model_type]
    units = adapter.units(model, "image", images, batch)
    crops, lengths = image_crops(model.config, sizes)
    assert lengths == [len(x) for x in images]
    assert [(u.image, u.crop, u.grid) for u in units] == [(c.image, c.crop, c.grid) for c in crops]
    for unit, crop in zip(units, crops):
        assert (unit.rows.tolist(), unit.source.tolist()) == (crop.rows, crop.tokens)
        assert torch.equal(images[unit.image][unit.rows], seen[0][unit.crop][unit.source])
    for image, x in enumerate(images):
        rest = set(range(len(x))) - {r for c in crops if c.image == image for r in c.rows}
        assert all(torch.equal(x[r], model.model.image_newline) for r in rest)
    return units


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_uniform_is_the_short_language_model(name, ratio):
    """Kept columns by hand (exact totals, shares per crop, newlines all there), logits by hand at every step."""
    model = tiny.build(name)
    batch = tiny.inputs(name, model)
    with model.compressed("uniform", ratio):
        tokens, logits = greedy(model, batch)
        stayed, counted = alive(model), model.compression.last.visual_tokens
    bare = tiny.build(name)
    for row in range(2):
        sample = tiny.single(batch, row, name)
        crops, lengths = image_crops(model.config, sample["image_sizes"].tolist())
        keep = budgets(crops, ratio)
        for image, total in enumerate(counted[row]):
            mine = [i for i, c in enumerate(crops) if c.image == image]
            assert total == sum(len(crops[i].tokens) for i in mine)
            assert sum(keep[i] for i in mine) == budget.kept(total, ratio)
        expected = columns(sample, IMG, lengths, crops, [spaced_grid(*c.grid, k) for c, k in zip(crops, keep)])
        padding = batch["input_ids"].shape[1] - sample["input_ids"].shape[1]
        assert [c - padding for c in stayed[row]] == expected
        close(logits[row], short_logits(bare, sample, tokens[row], expected))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_methods_keep_exact_counts_alone_and_in_a_batch(name, method):
    model = tiny.build(name)
    batch = tiny.inputs(name, model)
    with model.compressed(method, 0.5, **METHODS[method]):
        _, logits = greedy(model, batch)
        last = model.compression.last
        for row in range(2):
            sample = tiny.single(batch, row, name)
            crops, lengths = image_crops(model.config, sample["image_sizes"].tolist())
            keep = budgets(crops, 0.5)
            for image, kept in enumerate(last.visual_kept[row]):
                mine = [(c, k) for c, k in zip(crops, keep) if c.image == image]
                counts = [len(set(kept) & set(c.rows)) for c, _ in mine]
                newlines = set(range(lengths[image])) - {r for c, _ in mine for r in c.rows}
                assert newlines <= set(kept)
                assert all(n <= k for n, (_, k) in zip(counts, mine))
                assert method == "downsample" or sum(counts) == budget.kept(sum(len(c.rows) for c, _ in mine), 0.5)
            close(greedy(model, sample)[1][0], logits[row])
            assert model.compression.last.visual_kept[0] == last.visual_kept[row]


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_the_tower_reach_the_right_tokens(name):
    """fastervlm against the attention maps of the eager tower: padding is no candidate."""
    model, eager = tiny.build(name), tiny.build(name, attn="eager")
    batch = tiny.inputs(name, model)
    for row in range(2):
        sample = tiny.single(batch, row, name)
        with model.compressed("fastervlm", 0.6), torch.no_grad():
            model(**sample)
            (stayed,) = alive(model)
        crops, lengths = image_crops(model.config, sample["image_sizes"].tolist())
        a = scores(name, eager.model.vision_tower, tower_pixels(sample, crops))
        chosen = [top(a[c.crop][c.tokens], k) for c, k in zip(crops, budgets(crops, 0.6))]
        assert stayed == columns(sample, IMG, lengths, crops, chosen)


@pytest.mark.parametrize("method", ["visionzip", "avgpool", "tome", "downsample"])
@pytest.mark.parametrize("name", NAMES)
def test_merged_vectors(name, method, monkeypatch):
    """The language model on merged embeddings made by hand from the recorded decisions."""
    model, bare = tiny.build(name), tiny.build(name)
    sample = tiny.single(tiny.inputs(name, model), 0, name)
    crops, lengths = image_crops(model.config, sample["image_sizes"].tolist())
    read, made = projected(bare, sample, "image")
    places = (sample["input_ids"][0] == IMG).nonzero()[:, 0]
    with model.compressed(method, 0.5):
        spy = Spy(monkeypatch, model.compression.context.vision_method)
        tokens, logits = greedy(model, sample)
        (stayed,) = alive(model)
    vectors = {}
    for images, assignment in spy.calls:
        for row, unit in enumerate(images._units):
            (crop,) = [c for c in crops if c.crop == unit.crop]
            W = matrix(assignment, row, len(crop.tokens))
            with torch.no_grad():
                if method == "visionzip":
                    y = bare.model.multi_modal_projector((W @ read[crop.crop, crop.tokens])[None])[0]
                else:
                    y = W @ made[crop.crop, crop.tokens]
            at = [int(places[sum(lengths[: crop.image]) + crop.rows[k]]) for k in assignment.kept[row]]
            vectors |= dict(zip(at, y))
    assert len(vectors) == sum(budgets(crops, 0.5)) or (method == "downsample" and len(vectors) > 0)
    close(logits[0], short_logits(bare, sample, tokens[0], stayed, vectors))


# -- LLaVA-OneVision: images beyond the limit --------------------------------------------------------------------------
def interpolated(limit, sizes):
    """A model that mixes the tiles of large images, and a prompt of one row with such images."""
    model = tiny.build("llava_onevision")
    model.config.vision_aspect_ratio = limit
    batch = dict(pixel_values=torch.randn(len(sizes), 5, 3, 24, 24), image_sizes=torch.tensor(sizes))
    with torch.no_grad():
        lengths = [len(x) for x in model.model.get_image_features(**batch, return_dict=True).pooler_output]
    ids = torch.tensor([[1, 5, *[t for n in lengths for t in [IMG] * n + [7]], 8]])
    return model, dict(batch, input_ids=ids, attention_mask=torch.ones_like(ids)), lengths


@pytest.mark.parametrize("limit", ["anyres_max_1", "anyres_max_2"])
def test_interpolated_tiles_are_one_unit(limit, monkeypatch):
    """Scores are mixed as the features are; visionzip leaves its dominant tokens as they are."""
    model, sample, lengths = interpolated(limit, [(48, 48), (20, 48)])
    plain = greedy(model, sample)
    with model.compressed("uniform", 0.0):
        assert torch.equal(greedy(model, sample)[1], plain[1])
    eager, side = tiny.build("llava_onevision", attn="eager"), 6 if limit == "anyres_max_1" else 8
    a = scores("llava_onevision", eager.model.vision_tower, sample["pixel_values"][0])
    canvas = a[1:].view(2, 2, SIDE, SIDE).permute(0, 2, 1, 3).reshape(1, 1, 12, 12)
    mixed = F.interpolate(canvas, (side, side), mode="bilinear").flatten()
    assert lengths[0] == N + side * (side + 1)
    keep = budget.shares(budget.kept(N + side**2, 0.5), [float(N), float(side**2)], [N, side**2])
    with model.compressed("fastervlm", 0.5), torch.no_grad():
        model(**sample)
        kept = model.compression.last.visual_kept[0][0]
        assert model.compression.last.visual_tokens[0][0] == N + side**2
    rows = [N + i // side * (side + 1) + i % side for i in top(mixed, keep[1])]
    newlines = [N + (side + 1) * (i + 1) - 1 for i in range(side)]
    assert kept == sorted([*top(a[0], keep[0]), *rows, *newlines])
    with model.compressed("visionzip", 0.5):
        spy = Spy(monkeypatch, model.compression.context.vision_method)
        tokens, logits = greedy(model, sample)
        (stayed,) = alive(model)
    bare, vectors = tiny.build("llava_onevision"), {}
    bare.config.vision_aspect_ratio = limit
    whole = embed(bare, sample, sample["input_ids"])[0]
    places = (sample["input_ids"][0] == IMG).nonzero()[:, 0]
    read, _ = projected(bare, sample, "image")
    for images, assignment in spy.calls:
        for row, unit in enumerate(images._units):
            at = places[sum(lengths[: unit.image]) + unit.rows]
            W = matrix(assignment, row, len(unit.rows))
            if type(unit).__name__ == "Canvas":  # merged behind the projector, where tiles are mixed
                y = W @ whole[at]
                alone = [int(k) for k in range(len(W)) if (W[k] > 0).sum() == 1]
                assert alone and all(torch.equal(y[k], whole[at][assignment.kept[row, k]]) for k in alone)
            else:
                sources = range(N) if unit.source is None else unit.source
                with torch.no_grad():
                    y = bare.model.multi_modal_projector((W @ read[unit.crop, list(sources)])[None])[0]
            vectors |= dict(zip(at[assignment.kept[row]].tolist(), y))
    close(logits[0], short_logits(bare, sample, tokens[0], stayed, vectors))


@pytest.mark.parametrize("method", METHODS)
def test_methods_on_interpolated_tiles(method):
    model, sample, lengths = interpolated("anyres_max_2", [(48, 48), (40, 30)])
    with model.compressed(method, 0.5, **METHODS[method]):
        greedy(model, sample)
        last = model.compression.last
        for kept, total, rows in zip(last.visual_kept[0], last.visual_tokens[0], lengths):
            count = len(kept) - (rows - total)
            assert count == budget.kept(total, 0.5) or (method == "downsample" and count <= budget.kept(total, 0.5))


def test_images_of_a_group_are_not_tiled():
    model = tiny.build("llava_onevision")
    sizes = [(40, 30), (20, 48)]
    pixels = torch.randn(2, 3, 24, 24)
    ids = torch.tensor([[1, *[IMG] * 2 * (N + 1), 8]])
    batch = dict(input_ids=ids, pixel_values=pixels[:, None], image_sizes=torch.tensor(sizes))
    batch["batch_num_images"] = torch.tensor([2])
    with model.compressed("fastervlm", 0.5), torch.no_grad():
        model(**batch)
        assert model.compression.last.visual_tokens == [[N, N]]
        assert [len(k) for k in model.compression.last.visual_kept[0]] == [N // 2 + 1] * 2


# -- what generate offers ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_from_elsewhere(name):
    """With image_sizes the same crops; without them the line ends tell the canvas, which is then one crop."""
    model, bare = tiny.build(name), tiny.build(name)
    batch = tiny.inputs(name, model)
    rest = {k: v for k, v in batch.items() if k != "pixel_values"}
    sizes = rest.pop("image_sizes")
    encode = lambda: {"image": bare.model.get_image_features(**tiny.encoder_inputs(batch), return_dict=True)}
    with model.compressed("divprune", 0.5):
        expected = model(**batch).logits
        kept = model.compression.last.visual_kept
    with model.compressed("divprune", 0.5):
        close(model(**rest, image_sizes=sizes, mm_encoder_outputs=encode()).logits, expected)
        model(**rest, mm_encoder_outputs=encode())
        for mine, theirs in zip(model.compression.last.visual_kept, kept):
            assert [len(k) for k in mine] == [len(k) for k in theirs]
            for image in mine:
                assert len(set(image) & set(range(N))) == N // 2
        assert greedy(model, rest | dict(mm_encoder_outputs=encode()))[0].shape == (2, 5)
        with untouched(model), pytest.raises(ValueError, match="image_sizes"):
            model(**rest, image_sizes=sizes.flip(0), mm_encoder_outputs=encode())
    with model.compressed("fastervlm", 0.5), pytest.raises(ValueError, match=r"(?s)fastervlm.*mm_encoder_outputs"):
        model(**rest, image_sizes=sizes, mm_encoder_outputs=encode())


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_images_that_do_not_fit_the_prompt(name, how):
    model = tiny.build(name)
    batch = tiny.inputs(name, model)
    run = (lambda b: greedy(model, b)[1]) if how == "generate" else (lambda b: model(**b).logits.detach())
    sizes = batch["image_sizes"]
    wrong = [dict(image_sizes=sizes.flip(0)), dict(image_sizes=sizes[:2]), dict(image_sizes=0 * sizes + 48)]
    wrong += [dict(image_sizes=sizes[:2], pixel_values=batch["pixel_values"][:2])]
    plain = run(batch)
    with model.compressed("visionzip", 0.5):
        expected = run(batch)
        for change in wrong:
            with untouched(model), pytest.raises(ValueError, match="do not match"):
                run(batch | change)
        assert torch.equal(run(batch), expected)
    assert torch.equal(run(batch), plain)


@pytest.mark.parametrize("name", NAMES)
def test_the_tower_is_not_entered(name):
    model = tiny.build(name)
    with untouched(model), pytest.raises(ValueError, match="where='tower'"):
        model.compress("tome", 0.5, where="tower")
