"""Trained compressors that fill slots with vectors of their own: card checks, slow loops, finite differences."""

import math
import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_compress.engine.entry import stepped
from hf_compress.methods.base import VisionMethod
from hf_compress.methods.vision import hicom, llava_mini, m3, oryx, quecc, tokenpacker, uhd, voco
from hf_compress.modules.attention import Pooling
from hf_compress.modules.positions import middles, sincos, spread
from hf_compress.modules.queries import Queries
from hf_compress.modules.regions import CellKernel
from hf_compress.signals import QUESTION, Assignment
from hf_compress.tensors.cells import cells, means, members
from tests.invariants.reference import alone, batch_of, close, fresh, greedy, image_embeddings, logits_of, short_logits
from tests.tiny import IMG, inputs
from tests.toy import registered

METHODS = (
    "mqt",
    "oryx",
    "tokenpacker",
    "quecc",
    "hicom",
    "llava_mini",
    "uhd",
    "voco",
    "ppllava",
    "vqtoken",
    "doccompressor",
    "texthawk",
    "pvc",
)


def stir(module):
    """Weights that do something everywhere: at the start the last maps are zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return module


def check_gradients(module, *inputs):
    """Those of every weight and every input of `module` against finite differences."""
    module, inputs = stir(module).double(), [x.double().requires_grad_() for x in inputs]
    names, values = zip(*module.named_parameters())

    def run(*given):
        weights, rest = dict(zip(names, given)), given[len(names) :]
        return torch.func.functional_call(module, weights, rest)

    assert torch.autograd.gradcheck(run, (*(v.detach().requires_grad_() for v in values), *inputs), fast_mode=True)


class On(nn.Module):
    """A module with what it is told besides tensors, for `check_gradients`."""

    def __init__(self, module, *told):
        super().__init__()
        self.module, self.told = module, told

    def forward(self, *inputs):
        return self.module(*inputs, *self.told)


class Between(On):
    """The same of a module that gives several things, the real ones of text last."""

    def forward(self, *inputs):
        few, told = super().forward(*inputs)
        return few, told * self.told[0][..., None]


@dataclass
class Shown:
    """What a method sees of images of one grid."""

    embeddings: torch.Tensor
    grid: tuple
    module: nn.Module | None = None
    device = torch.device("cpu")

    def __len__(self):
        return len(self.embeddings)


def by_loop(attention, query, key, value, x):
    """`Pooling` of one query (D) over keys and values (N, C) and tokens (N, D), head by head."""
    q, size = attention.query(query), attention.query.out_features // attention.heads
    mean, read = torch.zeros_like(x[0]), []
    for h in range(attention.heads):
        part = slice(h * size, (h + 1) * size)
        share = torch.stack([(q[part] * attention.key(k)[part]).sum() / size**0.5 for k in key]).exp()
        share = share / share.sum()
        mean = mean + sum(s * token for s, token in zip(share, x)) / attention.heads
        read.append(sum(s * attention.value(v)[part] for s, v in zip(share, value)))
    return mean + attention.out(torch.cat(read))


# -- positions --------------------------------------------------------------------------------------------------------
def test_places_of_a_grid_of_24():
    """Whole steps: a quarter each of sines and cosines of the row and the column, and zeros beyond."""
    table = sincos(middles((24, 24)), 10).view(24, 24, 10)
    for i, j in ((0, 0), (3, 17), (23, 23)):
        angles = [(side + 0.5) / rate for side in (i, j) for rate in (1, 100)]
        expected = [
            f(torch.tensor(a)) for pair in (angles[:2], angles[2:]) for f in (torch.sin, torch.cos) for a in pair
        ]
        torch.testing.assert_close(table[i, j], torch.stack([*expected, torch.tensor(0.0), torch.tensor(0.0)]))


def test_every_beginning_of_the_places_covers_the_square():
    at = spread(256)
    assert at.min() > 0 and at.max() < 1 and len({tuple(p) for p in at.tolist()}) == 256
    for few, cells_seen in ((4, 3), (16, 4), (64, 4)):
        assert len({(int(2 * r), int(2 * c)) for r, c in at[:few].tolist()}) >= cells_seen


# -- mqt --------------------------------------------------------------------------------------------------------------
def test_mqt_card_few_queries_are_the_first_of_many():
    module, x = stir(Queries(8, 20, True)).double(), torch.randn(2, 24, 8).double()
    many = module(x, cells(4, 6, 16))
    torch.testing.assert_close(module(x, cells(4, 6, 5)), many[:, :5], atol=1e-8, rtol=0)


@pytest.mark.parametrize("content_keys", [True, False])
def test_mqt_by_loop(content_keys):
    module, x = stir(Queries(128, 9, content_keys)).double(), torch.randn(1, 12, 128).double()  # two heads
    out = module(x, cells(3, 4, 5))
    place = sincos(middles((3, 4)), 128).double()
    value = module.norm(x[0])
    for k in range(5):
        query = module.norm_query(module.query[k] + sincos(spread(9)[k], 128))
        key = module.norm_key(place + value if content_keys else place)
        torch.testing.assert_close(out[0, k], by_loop(module.attention, query, key, value, x[0]))


def test_mqt_keys_of_places_look_at_all_images_alike():
    """What the code does: one linear pooling for all images; with keys of what is there it is none."""
    a, b, layout = torch.randn(1, 24, 8), torch.randn(1, 24, 8), cells(4, 6, 6)
    linear, looks = (Queries(8, 6, content) for content in (False, True))
    torch.testing.assert_close(linear(a + b, layout), linear(a, layout) + linear(b, layout))
    assert not torch.allclose(looks(a + b, layout), looks(a, layout) + looks(b, layout), atol=1e-2)


def test_mqt_refuses_more_tokens_than_queries():
    model, batch = fresh("llava"), batch_of("llava")
    with pytest.raises(ValueError, match=r"queries=3 give at most 3 tokens, and 18 of 6 x 6"):
        model.compress("mqt", ratio=0.5, queries=3)
    assert not hasattr(model, "compressor")
    model.compress("mqt", keep=3, queries=3)
    logits_of(model, batch)
    assert model.compressor.vision.query.shape[0] == 3
    model.decompress()
    dynamic, pictures = fresh("qwen2_5_vl"), batch_of("qwen2_5_vl")
    dynamic.compress("mqt", ratio=0.5, queries=2)  # grids are known when they come
    with pytest.raises(ValueError, match="queries=2 give at most 2"):
        dynamic(**pictures)


# -- m3 ---------------------------------------------------------------------------------------------------------------
def pooled(x, grid, keep):
    answer = m3.M3().assign(Shown(x, grid), keep)
    return answer.apply(x)


def test_m3_card():
    x = torch.randn(2, 16, 5)
    torch.testing.assert_close(pooled(pooled(x, (4, 4), 4), (2, 2), 1), pooled(x, (4, 4), 1))
    torch.testing.assert_close(pooled(x, (4, 4), 1)[:, 0], x.mean(1))
    x = torch.randn(1, 576, 3)
    for side in (12, 6, 3, 1):
        expected = F.avg_pool2d(x.mT.unflatten(-1, (24, 24)), 24 // side).flatten(2).mT
        torch.testing.assert_close(pooled(x, (24, 24), side * side), expected)


# -- regions ----------------------------------------------------------------------------------------------------------
GRIDS = [(1, 1, 1), (4, 6, 6), (5, 7, 11), (6, 6, 36), (6, 4, 1)]


def cell_lists(layout):
    return [(layout.groups == k).nonzero().flatten().tolist() for k in range(len(layout.centres))]


@pytest.mark.parametrize(("h", "w", "k"), GRIDS)
def test_members_of_cells(h, w, k):
    layout = cells(h, w, k)
    at, real = members(layout)
    assert [row[keep].tolist() for row, keep in zip(at, real)] == cell_lists(layout)


def test_a_cell_kernel_is_a_depthwise_convolution():
    kernel, x, layout = CellKernel(5, 3), torch.randn(2, 54, 5), cells(6, 9, 6)
    torch.testing.assert_close(kernel(x, layout), means(x, layout))
    stir(kernel)
    picture = x.mT.unflatten(-1, (6, 9))
    expected = F.conv2d(picture, kernel.weight[:, None] / 9, stride=3, groups=5).flatten(2).mT
    torch.testing.assert_close(kernel(x, layout), expected)


@pytest.mark.parametrize(("h", "w", "k"), GRIDS)
def test_a_stretched_kernel_cell_by_cell(h, w, k):
    kernel, x, layout = stir(CellKernel(5, 3)), torch.randn(1, h * w, 5), cells(h, w, k)
    out = kernel(x, layout)
    for i, (top, left, bottom, right) in enumerate(layout.boxes.tolist()):
        size = (bottom - top, right - left)
        weight = F.interpolate(kernel.weight[None], size, mode="bilinear")[0]
        inside = x[0].mT.unflatten(-1, (h, w))[:, top:bottom, left:right]
        torch.testing.assert_close(out[0, i], (weight * inside).mean((1, 2)))


# -- oryx -------------------------------------------------------------------------------------------------------------
def test_oryx_card():
    """Half of what the source gives, which doubles a token alone and constant maps."""
    module, x = stir(oryx.Regions(6)), torch.randn(2, 64, 6)
    assert [module(x, cells(8, 8, k)).shape[1] for k in (64, 16, 4)] == [64, 16, 4]
    torch.testing.assert_close(module(x, cells(8, 8, 64)), x)
    even = x[:, :1].expand(-1, 64, -1)
    torch.testing.assert_close(module(even, cells(8, 8, 16)), even[:, :16])


@pytest.mark.parametrize(("h", "w", "k"), GRIDS)
def test_oryx_by_loop(h, w, k):
    module, x, layout = oryx.Regions(6), torch.randn(1, h * w, 6), cells(h, w, k)
    torch.testing.assert_close(module(x, layout), means(x, layout))
    out = stir(module)(x, layout)
    for i, mine in enumerate(cell_lists(layout)):
        p = x[0, mine].mean(0)
        share = torch.stack([module.query(p) @ module.key(x[0, j]) / 16 for j in mine]).softmax(0)
        torch.testing.assert_close(2 * out[0, i], p + share @ x[0, mine], atol=1e-5, rtol=1e-5)


# -- tokenpacker ------------------------------------------------------------------------------------------------------
def test_tokenpacker_card():
    """What cell 1 of 2 x 2 holds on the levels changes output 1 alone."""
    module, x, seen, layout = (
        stir(tokenpacker.Packer(8, 6, 2)),
        torch.randn(1, 16, 8),
        torch.randn(1, 16, 12),
        cells(4, 4, 4),
    )
    other = seen.clone()
    other[0, [2, 3, 6, 7]] += torch.randn(4, 12)
    out = module(x, seen, layout)
    change = (module(x, other, layout) - out).abs().amax(-1)[0]
    assert out.shape == (1, 4, 8) and change[1] > 1e-3 and change[[0, 2, 3]].max() == 0


@pytest.mark.parametrize(("h", "w", "k"), GRIDS)
def test_tokenpacker_by_loop(h, w, k):
    module, x, seen = (
        tokenpacker.Packer(128, 6, 2).double(),
        torch.randn(1, h * w, 128).double(),
        torch.randn(1, h * w, 12).double(),
    )
    layout = cells(h, w, k)
    assert module(x, seen, layout).abs().max() <= x.abs().max()
    out = stir(module)(x, seen, layout)
    for i, mine in enumerate(cell_lists(layout)):
        query = module.norm(x[0, mine].mean(0))
        keys, values = module.key(seen[0, mine]), module.value(seen[0, mine])
        torch.testing.assert_close(out[0, i], module.mlp(by_loop(module.attention, query, keys, values, x[0, mine])))


@pytest.mark.parametrize(
    ("depth", "levels", "expected"), [(23, None, [11, 7, 1, 0]), (5, None, [2, 0]), (1, None, [0]), (5, (0, 3), [3, 0])]
)
def test_levels_of_a_tower(depth, levels, expected):
    """Hidden states 12, 16, 22, 23 of 23, counted from the end; fewer where the tower has fewer."""
    method = tokenpacker.TokenPacker(levels=levels)
    assert method.backs(depth) == expected and {read.at for read in method.reads(depth)} == set(expected)


def test_levels_are_the_hidden_states_of_the_tower():
    """The module is shown what the blocks give, the deepest last, and no gradient goes there."""
    model, batch = fresh("llava"), batch_of("llava", "equal")
    with torch.no_grad():
        found = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    model.compress("tokenpacker", ratio=0.5, levels=(1, 0))
    shown, module = [], model.compressor.vision
    module.register_forward_hook(lambda _, inputs, out: shown.append(inputs[1]))
    model(**batch)
    expected = torch.cat([found[-3][:, 1:], found[-2][:, 1:]], -1)  # the projector reads the last but one
    torch.testing.assert_close(shown[0], expected)
    assert not shown[0].requires_grad and module.key[1].in_features == 2 * model.config.vision_config.hidden_size


# -- uhd --------------------------------------------------------------------------------------------------------------
def test_uhd_card():
    """24 x 24 tokens and 12 x 12 queries: regions of 2 x 2, and a token outside of one changes nothing there."""
    module, x, layout = stir(uhd.Slice(8, 12)), torch.randn(1, 576, 8), cells(24, 24, 144)
    assert set(layout.sizes.tolist()) == {4} and cells(28, 28, 144).sizes.sum() == 784
    out, other = module(x, layout), x.clone()
    other[0, 25:] = other[0, 25:][torch.randperm(551)]  # all but the first 25, of which 0, 1 and 24 are in region 0
    other[0, 25] = x[0, 25]
    torch.testing.assert_close(module(other, layout)[0, 0], out[0, 0])
    assert (module(other, layout) - out).abs().amax(-1)[0, 12:].median() > 1e-3


@pytest.mark.parametrize(("h", "w", "k"), GRIDS)
def test_uhd_by_loop(h, w, k):
    module, x, layout = stir(uhd.Slice(128, 3)).double(), torch.randn(1, h * w, 128).double(), cells(h, w, k)
    out, value, place = module(x, layout), module.norm(x[0]), sincos(middles((h, w)), 128).double()
    key = module.norm_key(value + place)
    for i, mine in enumerate(cell_lists(layout)):
        top, left, bottom, right = layout.boxes[i].tolist()
        at = torch.tensor([(top + bottom) / 2 / h, (left + right) / 2 / w])
        table = module.query
        for side in at.tolist():  # between two rows, then between two columns; the middles of the table are its values
            place_ = min(max(side * 3 - 0.5, 0), 2)
            low = min(int(place_), 1)
            table = table[:, low] * (1 - place_ + low) + table[:, low + 1] * (place_ - low)
        query = module.norm_query(table) + sincos(at, 128).double()
        expected = by_loop(module.attention, query, key[mine], value[mine], x[0, mine])
        torch.testing.assert_close(out[0, i], expected, atol=1e-6, rtol=1e-6)


# -- quecc ------------------------------------------------------------------------------------------------------------
def test_quecc_card():
    module, x, seen, layout = (
        stir(quecc.Asking(8, 6, 2, 2)),
        torch.randn(1, 16, 8),
        torch.randn(1, 16, 12),
        cells(4, 4, 4),
    )
    asks = torch.randn(2, 1, 8)
    other = seen.clone()
    other[0, [2, 3, 6, 7]] += torch.randn(4, 12)
    out = module(x, seen, asks[0], layout)
    change = (module(x, other, asks[0], layout) - out).abs().amax(-1)[0]
    assert out.shape == (1, 4, 8) and change[1] > 1e-3 and change[[0, 2, 3]].max() == 0
    assert module(x, seen, asks[0], cells(4, 4, 1)).shape == (1, 1, 8)
    assert not torch.allclose(module(x, seen, asks[1], layout), out, atol=1e-4)
    nn.init.zeros_(module.text[2].weight)  # the norm behind the map: nothing of the question is left
    torch.testing.assert_close(module(x, seen, asks[1], layout), module(x, seen, asks[0], layout))


def test_quecc_by_loop():
    module, x, seen, layout = (
        stir(quecc.Asking(128, 6, 2, 3)).double(),
        *(torch.randn(1, 12, c).double() for c in (128, 12)),
        cells(4, 3, 5),
    )
    question = torch.randn(1, 128).double()
    out = module(x, seen, question, layout)
    told = torch.stack([module.query(module.norm(token) + module.text(question[0])) for token in x[0]])
    query = module.kernel(told[None], layout)[0]
    for i, mine in enumerate(cell_lists(layout)):
        keys, values = module.key(seen[0, mine]), module.value(seen[0, mine])
        torch.testing.assert_close(out[0, i], module.mlp(by_loop(module.attention, query[i], keys, values, x[0, mine])))


# -- hicom ------------------------------------------------------------------------------------------------------------
def test_hicom_card():
    module, x, g, layout = stir(hicom.Guided(8, 4)), torch.randn(2, 24, 8), torch.randn(2, 8), cells(4, 6, 6)
    normed = module.norm(x)
    weights = module.pooled(torch.ones(2, 24, 8), normed, g, layout)
    torch.testing.assert_close(weights, torch.ones(2, 6, 8))
    alike = normed[:, :1].expand_as(normed)
    torch.testing.assert_close(module.pooled(x, alike, g, layout), means(x, layout))
    assert [module(x, g, (4, 6), k).shape[1] for k in (1, 2, 5, 12)] == [1, 2, 5, 12]


def test_hicom_by_loop():
    """Five of seven tokens are local, two global."""
    module, x, g = stir(hicom.Guided(128, 2)).double(), torch.randn(1, 12, 128).double(), torch.randn(1, 128).double()
    out, guide, normed = module(x, g, (4, 3), 7)[0], module.guide(g[0]), module.norm(x[0])
    for i, mine in enumerate(cell_lists(cells(4, 3, 5))):
        share = torch.stack([module.look(guide) @ module.match(normed[j]) / 128**0.5 for j in mine]).softmax(0)
        torch.testing.assert_close(out[i], module.local(share @ x[0, mine]))
    scale, shift = module.bend(guide).chunk(2)
    place = sincos(middles((4, 3)), 128).double()
    for k in range(2):
        query = module.norm_query(module.query[k] * (1 + scale) + shift)
        expected = module.whole(by_loop(module.attention, query, normed + place, normed, x[0]))
        torch.testing.assert_close(out[5 + k], expected)


# -- llava_mini -------------------------------------------------------------------------------------------------------
def test_llava_mini_card():
    """Nothing is told at the start; text is told by all that stands before it, and compressed tokens know no text."""
    module, x, layout = llava_mini.Fusion(8, 4, 2), torch.randn(1, 12, 8), cells(3, 4, 2)
    text, real = torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    few, told = module(x, text, real, layout)
    torch.testing.assert_close(few, module.queries(x, layout))
    assert told.abs().max() == 0 and few.shape == (1, 2, 8) and told.shape == (1, 5, 8)
    stir(module)
    few, told = module(x, text, real, layout)
    other = text.clone()
    other[0, 2] += torch.randn(8)
    one, new = module(x, other, real, layout)
    change = (new + other - told - text).abs().amax(-1)[0]
    torch.testing.assert_close(one, few)
    assert change[:2].max() < 1e-5 and change[2:].min() > 1e-3


def test_llava_mini_by_loop():
    """Two layers over [12 tokens, 2 compressed, 3 words], token by token; one word of the second sample is padding."""
    module, layout = stir(llava_mini.Fusion(128, 4, 2)).double(), cells(3, 4, 2)
    x, text = torch.randn(2, 12, 128).double(), torch.randn(2, 3, 128).double()
    real = torch.tensor([[True, True, True], [False, True, True]])
    few, told = module(x, text, real, layout)
    for b in range(2):
        words = real[b].nonzero()[:, 0].tolist()
        z = torch.cat([x[b], module.queries(x, layout)[b], text[b, words]])
        at = middles((3, 4))
        beside = torch.tensor([[i / 24, 2.0] for i in range(len(words))])
        place = sincos(torch.cat([at, at[layout.centres], beside]), 128).double()
        for attention, mlp in zip(module.attention, module.mlp):
            normed = attention.norm(z) + place
            (k, v), rows = attention.key_value(normed).chunk(2, -1), []
            for i, q in enumerate(attention.query(normed)):
                read = []
                for part in (slice(0, 64), slice(64, 128)):
                    share = (k[: i + 1, part] @ q[part] / 8).softmax(0)
                    read.append(share @ v[: i + 1, part])
                rows.append(z[i] + attention.out(torch.cat(read)))
            z = mlp(torch.stack(rows))
        torch.testing.assert_close(few[b], z[12:14])
        torch.testing.assert_close(told[b, words], z[14:] - text[b, words])


class Told(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.word = nn.Parameter(torch.randn(width))


@dataclass
class Tells(VisionMethod):
    """Keeps the first tokens as they are, and tells text the mean of the image times a trained vector."""

    def module(self, model):
        return Told(model.config.get_text_config().hidden_size)

    def reads(self, depth):
        return {QUESTION}

    def assign(self, tokens, keep):
        return Assignment(torch.arange(keep).repeat(len(tokens), 1))

    def make(self, tokens, assignment):
        text, _ = tokens.question
        told = (tokens.embeddings.mean(1) * tokens.module.word)[:, None].expand_as(text)
        return assignment.pick(tokens.embeddings), told


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_what_text_is_told(name, side):
    """Embeddings with the mean over the images before each word added by hand, row by row; answers are not told."""
    model, batch = fresh(name), inputs(name, fresh(name), side=side)
    with registered(Tells):
        model.compress("tells", ratio=0.5)
        word = model.compressor.vision.word.detach()
        given = logits_of(model, batch)
        kept = model.compression.last.visual_kept
        labelled = dict(batch, labels=labels(batch) if side == "left" else None)
        answered = logits_of(model, labelled)
    for row in range(2):
        sample = alone(name, batch, row)
        images, visual = image_embeddings(name, sample), sample["input_ids"][0] == IMG
        ends = torch.tensor([len(x) for x in images]).cumsum(0)
        before = torch.where(visual, 0, torch.searchsorted(ends, visual.cumsum(0), right=True))  # images before a word
        added = [
            sum((x.mean(0) * word for x in images[:n]), torch.zeros_like(word)) / max(n, 1) for n in before.tolist()
        ]
        for found, told in ((given, len(before)), (answered, len(before) - 1)):
            more = torch.stack(added) * (torch.arange(len(before)) < told)[:, None]
            expected = short_logits(name, sample, torch.tensor([5]), kept[row], more=more)
            last = int(batch["attention_mask"][row].nonzero()[-1])
            close(found[row, last][None], expected[:1])
            if side == "right":
                break


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_text_in_chunks_is_told(name):
    """Of the last chunks, too, which show no image, and of one row; static caches are given ids and refuse."""
    model = fresh(name)
    batch = inputs(name, model)
    model.compress("llava_mini", ratio=0.5)
    stir(model.compressor)
    whole, length = greedy(model, batch), batch["input_ids"].shape[1]
    for size in (5, length - 2, length - 1):
        close(greedy(model, batch, prefill_chunk_size=size).logits, whole.logits)
    with pytest.raises(ValueError, match=r"llava_mini.*adds to the text"):
        greedy(model, batch, cache_implementation="static")


@pytest.mark.parametrize("method", ["quecc", "hicom"])
def test_another_question_gets_other_tokens(method):
    model, batch = fresh("llava"), batch_of("llava", "equal")
    model.compress(method, ratio=0.75)
    stir(model.compressor)
    shown = []
    model.compressor.vision.register_forward_hook(lambda _, inputs, out: shown.append(out))
    other = dict(batch, input_ids=batch["input_ids"].clone())
    other["input_ids"][:, -1] += 1
    for one in (batch, other, batch):
        model(**one)
    assert torch.equal(shown[0], shown[2]) and not torch.allclose(shown[0], shown[1], atol=1e-4)


# -- positions, as of V2PE --------------------------------------------------------------------------------------------
def by_hand(visual, step):
    """Positions of one row, and the next one of text."""
    at, out = -1.0, []
    for seen in visual:
        at = at + step if seen else float(math.ceil(at)) + 1
        out.append(at)
    return out, math.ceil(at) + 1


@pytest.mark.parametrize("step", [1.0, 0.25, 0.1, 1 / 256])
def test_card_of_v2pe(step):
    """Text 0, 1, 2, six visual tokens from 2.25 to 3.5, text 5, 6; a step of 1 is none."""
    rows = ["tttvvvvvvtt", "tvvtvvvvvtt", "vvvvvvvvvvv", "ttttttttttt"]
    visual = torch.tensor([[c == "v" for c in row] for row in rows])
    position, saved = stepped(torch.arange(11).expand(4, -1), visual, step)
    for row, seen in enumerate(visual.tolist()):
        expected, following = by_hand(seen, step)
        assert position[row].tolist() == pytest.approx(expected, abs=1e-5) and 11 - int(saved[row]) == following
    if step == 0.25:
        assert position[0].tolist() == [0, 1, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 5, 6]


def test_shared_positions():
    """Three visual tokens at one position, then the next three; text at the next one."""
    visual = torch.tensor([[c == "v" for c in "ttvvvvvttvt"], [c == "v" for c in "vvvvvvvvvvv"]])
    position, saved = stepped(torch.arange(11).expand(2, -1), visual, 1.0, 3)
    assert position.tolist() == [[0, 1, 2, 2, 2, 3, 3, 4, 5, 6, 7], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]]
    assert saved.tolist() == [3, 7]


@pytest.mark.parametrize("positions", [0.25, "shared:4"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["uniform", "avgpool"])
def test_steps_of_positions_in_a_model(method, side, positions):
    """Prefill, and steps that are generated, against the bare model with positions written by hand."""
    model, batch = fresh("llava"), inputs("llava", fresh("llava"), side=side)
    model.compress(method, ratio=0.5, positions=positions)
    if side == "left":
        run = greedy(model, batch)
        tokens, got = run.tokens, run.logits
    else:
        tokens, got = batch["input_ids"][:, :1], logits_of(model, batch)[:, -1:]
        got = torch.stack([logits_of(model, batch)[b, int(batch["attention_mask"][b].sum()) - 1] for b in range(2)])[
            :, None
        ]
    kept = model.compression.last.visual_kept
    for b in range(2):
        sample = alone("llava", batch, b)
        images = image_embeddings("llava", sample)
        vectors = None
        if method == "avgpool":
            vectors = []
            for x, k in zip(images, kept[b]):
                group = torch.arange(len(x)) * len(k) // len(x)
                vectors.append(torch.stack([x[group == i].mean(0) for i in range(len(k))]))
        close(got[b], short_logits("llava", sample, tokens[b], kept[b], vectors=vectors, positions=positions))


def test_steps_of_positions_are_refused_where_distances_are_rows():
    for name, asked, knobs, message in (
        ("qwen2_5_vl", "uniform", {}, r"positions=0.5 has no meaning for the \(t, h, w\) positions"),
        (
            "llava",
            ["uniform", "snapkv"],
            {},
            "positions=0.5 of 'uniform' goes neither with methods .* 'snapkv' measures",
        ),
        ("llava_window", "uniform", {}, "LlavaForConditionalGeneration with sliding windows measures"),
        ("llava", "uniform", {"positions": 1.5}, "positions=1.5 must be one of .* or a number above 0 and at most 1"),
        ("llava", "uniform", {"positions": "shared:0"}, "positions='shared:0' must be .* 'shared:G', G visual tokens"),
        (
            "qwen2_5_vl",
            "uniform",
            {"positions": "shared:4"},
            r"positions='shared:4' has no meaning for the \(t, h, w\)",
        ),
        ("llava", ["uniform", "snapkv"], {"positions": "shared:4"}, "positions='shared:4' of 'uniform' goes neither"),
    ):
        with pytest.raises(ValueError, match=message):
            fresh(name).compress(asked, ratio=0.5, **({"positions": 0.5} | knobs))
    model, batch = fresh("llava"), batch_of("llava", "equal")
    model.compress("uniform", ratio=0.5, positions=0.5)
    with pytest.raises(ValueError, match=r"positions=0\.5: prompts of static caches count whole positions"):
        model.generate(**batch, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match=r"prefill_chunk_size=7: positions=0\.5 counts the tokens of whole images"):
        model.generate(**batch, max_new_tokens=2, prefill_chunk_size=7)


# -- all of them ------------------------------------------------------------------------------------------------------
MODULES = {
    "mqt": (lambda: On(Queries(8, 6, True), cells(3, 4, 5)), [(2, 12, 8)]),
    "mqt_places": (lambda: On(Queries(8, 6, False), cells(3, 4, 5)), [(2, 12, 8)]),
    "oryx": (lambda: On(oryx.Regions(8), cells(3, 4, 5)), [(2, 12, 8)]),
    "tokenpacker": (lambda: On(tokenpacker.Packer(8, 6, 2), cells(3, 4, 5)), [(2, 12, 8), (2, 12, 12)]),
    "quecc": (lambda: On(quecc.Asking(8, 6, 2, 3), cells(3, 4, 5)), [(2, 12, 8), (2, 12, 12), (2, 8)]),
    "voco": (lambda: voco.Mark(8), [(2, 12, 8)]),
    "uhd": (lambda: On(uhd.Slice(8, 3), cells(3, 4, 5)), [(2, 12, 8)]),
    "hicom": (lambda: On(hicom.Guided(8, 3), (3, 4), 5), [(2, 12, 8), (2, 8)]),
    "llava_mini": (
        lambda: Between(llava_mini.Fusion(8, 6, 2), torch.tensor([[True] * 3, [False, True, True]]), cells(3, 4, 2)),
        [(2, 12, 8), (2, 3, 8)],
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_finite_differences(name):
    make, shapes = MODULES[name]
    check_gradients(make(), *(torch.randn(shape) for shape in shapes))


def test_pooling_begins_as_means_of_tokens():
    pool, x = Pooling(128, 6), torch.randn(2, 10, 128)
    out = pool(torch.randn(2, 3, 128), torch.randn(2, 10, 6), torch.randn(2, 10, 6), x)
    assert out.amax() < x.amax() and not torch.allclose(out[:, 0], out[:, 1], atol=1e-4)
    seen = torch.zeros(3, 10, dtype=torch.bool)
    seen[0, 4] = seen[1, 2] = seen[2, 9] = True
    one = pool(torch.randn(2, 3, 128), torch.randn(2, 10, 6), torch.randn(2, 10, 6), x, seen)
    torch.testing.assert_close(one, x[:, [4, 2, 9]])


def labels(batch):
    """On the last token: the text before it asks."""
    out = torch.full_like(batch["input_ids"], -100)
    out[:, -1] = batch["input_ids"][:, -1]
    return out


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "llava_next"])
@pytest.mark.parametrize("method", METHODS)
def test_trained_weights_fill_each_image_alone(method, name):
    """Weights that do something: each sample of a ragged batch as alone, and every parameter learns."""
    model, batch = fresh(name), batch_of(name)
    model.compress(method, ratio=0.5)
    stir(model.compressor)
    whole = logits_of(model, batch)
    for row in range(2):
        close(whole[row, -1], logits_of(model, alone(name, batch, row))[0, -1])
    before = whole[:, -1].clone()
    stir(model.compressor)
    assert not torch.allclose(logits_of(model, batch)[:, -1], before, atol=1e-3)
    model(**batch, labels=labels(batch)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.compressor.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_one_checkpoint_serves_every_budget(method, tmp_path):
    """Saved alone, and inside the checkpoint of the model; the budget is chosen behind it."""
    from transformers import AutoModelForImageTextToText

    model, batch = fresh("llava"), batch_of("llava")
    model.compress(method, ratio=0.5)
    stir(model.compressor)
    model.save_pretrained(tmp_path / "whole")
    model.compression.save(tmp_path / "alone")
    found = []
    for keep in (5, 1):
        model.compression.set_budget(keep=keep)
        found.append(logits_of(model, batch))
    model.decompress()
    model.compress(method, keep=5, weights=tmp_path / "alone")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").eval()
    for keep, expected in zip((5, 1), found):
        for one in (model, again):
            one.compression.set_budget(keep=keep)
            torch.testing.assert_close(logits_of(one, batch), expected)


KNOBS = [
    ("mqt", "queries", 0), ("mqt", "content_keys", "no"), ("tokenpacker", "levels", []),
    ("tokenpacker", "levels", [1, 1]), ("tokenpacker", "levels", 3), ("quecc", "kernel", 0), ("hicom", "queries", 0),
    ("uhd", "side", 0), ("llava_mini", "layers", 0), ("llava_mini", "queries", True),
    ("uniform", "positions", 0), ("uniform", "positions", "near"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "knob", "value"), KNOBS)
def test_knobs(method, knob, value):
    with pytest.raises(ValueError, match=rf"{knob}={re.escape(repr(value))} must be"):
        fresh("llava").compress(method, ratio=0.5, **{knob: value})
