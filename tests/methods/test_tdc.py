"""TDC: which frames are whole, what the others get, and what they become."""

import pytest
import torch

from hf_compress.methods.vision.tdc import TDC, Context, chunked
from hf_compress.modules.positions import middles, sincos
from hf_compress.tensors.cells import cells, means
from tests import tiny
from tests.invariants.reference import alone, close, fresh, logits_of
from tests.methods.test_ppllava import shown
from tests.methods.test_vision_compressors import On, by_loop, check_gradients, labels, stir
from tests.tiny import VID


def video(frames, grid=(2, 3), width=8, module=None, rows=1):
    """Frames that differ by a little from each other."""
    N = grid[0] * grid[1]
    x = torch.randn(rows, 1, N, width) + 0.1 * torch.randn(rows, frames, N, width)
    return shown(x.flatten(1, 2), torch.randn(rows, width), [grid] * frames, module or Context(width))


def counts(answer, tokens, row=0):
    size = tokens.count // len(tokens.grids)
    return torch.bincount(answer.kept[row] // size, minlength=len(tokens.grids)).tolist()


def test_card_of_a_chunk():
    """Eight frames of one scene: one of 144 tokens whole, seven of 16."""
    tokens = video(8, (12, 12))
    assert TDC().firsts(tokens) == [[0] * 8]
    answer = TDC().assign(tokens, 144 + 7 * 16)
    assert counts(answer, tokens) == [144, *[16] * 7]
    out = TDC().make(tokens, answer)
    torch.testing.assert_close(out[:, :144], tokens.embeddings[:, :144])


def test_card_of_scenes():
    """Equal frames are never parted before different ones; chunks are no longer than asked."""
    tokens = video(10)
    x = tokens.embeddings.view(10, 6, 8)
    x[1:4], x[5:] = x[0], x[4]
    assert TDC(cuts=0.1).firsts(tokens) == [[0] * 4 + [4] * 6]
    assert TDC(cuts=0.1, chunk=3).firsts(tokens) == [[0, 0, 0, 3, 4, 4, 4, 7, 7, 7]]
    assert chunked([0, 0, 1, 2, 2, 2], 2) == [0, 0, 2, 3, 3, 5]
    assert TDC(chunk=1).firsts(tokens) == [list(range(10))]


def test_by_loop():
    """Two videos with scenes of their own; of each frame what its count says, and the reading frame by frame."""
    module = stir(Context(128)).double()
    tokens = video(5, width=128, module=module, rows=2)
    tokens.embeddings = tokens.embeddings.double()
    tokens.embeddings.view(2, 5, 6, 128)[1, 3:] *= -1
    tokens.question = tokens.question[0].double(), tokens.question[1]
    method = TDC(cuts=0.2, weight=3)
    firsts = method.firsts(tokens)
    assert firsts[1] == [0, 0, 0, 3, 3] and firsts[0] != firsts[1]
    answer = method.assign(tokens, 14)
    out, place = method.make(tokens, answer), sincos(middles((2, 3)), 128).double()
    for row in range(2):
        start, question = 0, tokens.question[0][row, 0]
        for t, (k, first) in enumerate(zip(counts(answer, tokens, row), firsts[row])):
            x = tokens.embeddings[row].view(5, 6, 128)
            layout = cells(2, 3, k)
            expected = means(x[first][None], layout)[0]
            assert answer.kept[row, start : start + k].tolist() == (6 * t + layout.centres).tolist()
            if t != first:
                z = module.among(torch.cat([expected, question[None]])[None])[0, :k]
                value = module.norm(x[t])
                expected = [
                    module.mlp(
                        by_loop(module.attention, module.norm_query(z[i]) + place[at], value + place, value, x[t])
                    )
                    for i, at in enumerate(layout.centres.tolist())
                ]
                expected = torch.stack(expected)
            torch.testing.assert_close(out[row, start : start + k], expected)
            start += k
        assert start == 14


OTHERS = (
    "ppllava",
    "vqtoken",
    "pvc",
    "doccompressor",
    "vtg",
    "mome",
    "interleaved_vt",
    "fit",
    "segearth",
    "adaptvision",
)


@pytest.mark.parametrize("method", ["tdc", *OTHERS])
def test_videos_of_a_model(method):
    """Weights that do something: every sample of a ragged batch as alone, exact budgets, and every parameter learns."""
    model = fresh("qwen2_5_vl")
    batch = tiny.batch("qwen2_5_vl", model, [[1, 5, VID, 7, 8], [1, VID, 9, 11, VID, 12]])
    model.compress(method, ratio=0.3)
    stir(model.compressor)
    whole = logits_of(model, batch)
    last = model.compression.last
    assert last.visual_left == [[round(0.7 * n) for n in sample] for sample in last.visual_tokens]
    for row in range(2):
        close(whole[row, -1], logits_of(model, alone("qwen2_5_vl", batch, row))[0, -1])
    model(**batch, labels=labels(batch)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.compressor.parameters())


def test_saved_alone(tmp_path):
    """Read again for another budget: the same answers."""
    model = fresh("qwen2_5_vl")
    batch = tiny.batch("qwen2_5_vl", model, [[1, 5, VID, 7, 8]])
    model.compress("tdc", ratio=0.3)
    stir(model.compressor)
    model.compression.save(tmp_path)
    model.compression.set_budget(0.5)
    expected = logits_of(model, batch)
    model.decompress()
    model.compress("tdc", ratio=0.5, weights=tmp_path)
    torch.testing.assert_close(logits_of(model, batch), expected)


def test_gradients_are_those_of_finite_differences():
    check_gradients(On(Context(8), cells(2, 3, 2)), torch.randn(2, 2, 8), torch.randn(2, 8), torch.randn(2, 6, 8))


@pytest.mark.parametrize(("knob", "value"), [("chunk", 0), ("cuts", 1.0), ("weight", 0.5)])
def test_knobs(knob, value):
    with pytest.raises(ValueError, match=f"{knob}={value}.* must be"):
        fresh("qwen2_5_vl").compress("tdc", ratio=0.5, **{knob: value})
