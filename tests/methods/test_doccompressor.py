"""DocCompressor: a page of crops, each token of the page in small with the part of the page that it shows."""

import pytest
import torch

from hf_compress.methods.vision.doccompressor import DocCompressor, Reading, Window
from tests.invariants.reference import fresh
from tests.methods.test_ppllava import shown
from tests.methods.test_vision_compressors import check_gradients, stir

WHOLE = (0.0, 0.0, 1.0, 1.0)


def page(rows, columns, grid=(4, 4), seed=0, module=None):
    """The page in small, and rows x columns crops, all of the same grid."""
    torch.manual_seed(seed)
    n = 1 + rows * columns
    tokens = shown(torch.randn(1, n * grid[0] * grid[1], 8), torch.zeros(1, 8), [grid] * n, module or Reading(8, 2))
    edges = [(i / rows, j / columns, (i + 1) / rows, (j + 1) / columns) for i in range(rows) for j in range(columns)]
    tokens.boxes = [WHOLE, *edges]
    return tokens


def made(tokens, keep, method=DocCompressor()):  # noqa: B008
    answer = method.assign(tokens, keep)
    return answer.kept[0].tolist(), method.make(tokens, answer)[0]


def test_begins_as_the_page_in_small():
    tokens = page(2, 2)
    kept, out = made(tokens, 16)
    assert kept == list(range(16))
    torch.testing.assert_close(out, tokens.embeddings[0, :16])
    kept, out = made(tokens, 20)  # and further tokens as they are
    assert kept == [*range(16), 24, 40, 56, 72]
    torch.testing.assert_close(out[16:], tokens.embeddings[0, kept[16:]])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (2, 3)])
def test_card(rows, columns):
    """As many outputs whatever the crops; one token of them changes exactly one output, that of its place; of one crop
    every output reads one token."""
    module = stir(Reading(8, 2))
    tokens = page(rows, columns, module=module)
    _, out = made(tokens, 16)
    assert len(out) == 16
    for crop, i, j in ((0, 0, 0), (rows * columns - 1, 3, 1)):
        other = page(rows, columns, module=module)
        other.embeddings[0, 16 * (1 + crop) + 4 * i + j] += torch.randn(8)
        changed = ((made(other, 16)[1] - out).abs().amax(-1) > 1e-6).nonzero()[:, 0].tolist()
        top, left = crop // columns, crop % columns
        assert changed == [4 * ((4 * top + i) // rows) + (4 * left + j) // columns]
    if rows == columns == 1:
        large = tokens.embeddings[:, 16:]
        by_one = module(tokens.embeddings[:, :16], large, torch.arange(16)[None])
        torch.testing.assert_close(out, by_one[0])


def test_by_loop():
    """Two heads, groups of 0 to 4 tokens."""
    module = stir(Window(128)).double()
    x, y, groups = torch.randn(3, 128).double(), torch.randn(7, 128).double(), torch.tensor([2, 0, -1, 2, 2, 2, 0])
    keys, values = module.key_value(module.norm_key(y)).chunk(2, -1)
    out = module(x[None], y[None], groups[None])[0]
    for k in range(3):
        mine, read = (groups == k).nonzero()[:, 0].tolist(), []
        for part in (slice(0, 64), slice(64, 128)):
            q = module.query(module.norm(x[k]))[part]
            share = torch.stack([(q * keys[i, part]).sum() / 8 for i in mine]).softmax(0) if mine else []
            read.append(sum((s * values[i, part] for s, i in zip(share, mine)), torch.zeros(64).double()))
        torch.testing.assert_close(out[k], x[k] + module.out(torch.cat(read)))


def test_where_no_crop_lies_the_page_in_small_is_read():
    tokens = page(1, 2)
    tokens.boxes = [WHOLE, (0.0, 0.0, 0.5, 1.0), (0.0, 0.5, 0.5, 1.0)][:2] + [(0.0, 0.0, 0.5, 1.0)]
    tokens.module = module = stir(Reading(8, 1))
    out = made(tokens, 16)[1]
    other = page(1, 2, module=module)
    other.boxes = tokens.boxes
    other.embeddings[0, 15] += torch.randn(8)
    changed = ((made(other, 16)[1] - out).abs().amax(-1) > 1e-6).nonzero()[:, 0].tolist()
    assert changed == [15]


def test_crops_without_a_page_in_small_are_refused():
    tokens = page(2, 2)
    tokens.boxes = tokens.boxes[1:] + [WHOLE]
    with pytest.raises(ValueError, match="must begin with the whole image in small"):
        made(tokens, 16)


def test_gradients_are_those_of_finite_differences():
    groups = torch.tensor([[0, 2, 1, -1, 2], [2, 2, 0, 1, 1]])

    class On(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Reading(8, 2)

        def forward(self, x, y):
            return self.module(x, y, groups)

    check_gradients(On(), torch.randn(2, 3, 8), torch.randn(2, 5, 8))


def test_knobs():
    with pytest.raises(ValueError, match="layers=0 must be"):
        fresh("llava").compress("doccompressor", ratio=0.5, layers=0)
