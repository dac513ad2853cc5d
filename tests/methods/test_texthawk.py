"""TextHawk: wide cells in quarters, arcs of places, and the resampler by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_compress.methods.vision.texthawk import Resampler, wide_cells
from hf_compress.modules.positions import Arc, middles
from hf_compress.tensors.cells import cells
from tests.invariants.reference import fresh
from tests.methods.test_vision_compressors import On, check_gradients, stir


def test_card_of_the_grid():
    """16 x 16 patches: 64 quarters of 2 x 2, of which four of a row make each of 8 x 2 tokens, in scan order."""
    coarse, fine, of = wide_cells(16, 16, 16)
    assert coarse.boxes.tolist() == [[2 * i, 8 * j, 2 * i + 2, 8 * j + 8] for i in range(8) for j in range(2)]
    assert of.tolist() == [[4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3] for k in range(16)]
    expected = [[2 * i, 2 * j, 2 * i + 2, 2 * j + 2] for i in range(8) for j in range(8)]
    assert fine.boxes.tolist() == expected and torch.equal(fine.groups, cells(16, 16, 64).groups)


@pytest.mark.parametrize(("h", "w", "k"), [(1, 1, 1), (5, 7, 6), (4, 4, 16), (3, 10, 9), (6, 3, 11), (1, 9, 2)])
def test_quarters_fill_their_cells(h, w, k):
    coarse, fine, of = wide_cells(h, w, k)
    assert coarse.centres.shape == (k,) and (coarse.centres.diff() > 0).all()
    assert torch.equal(coarse.groups[coarse.centres], torch.arange(k))
    assert fine.groups.bincount().min() >= 1 and of.shape == (k, 4)
    for cell, mine in enumerate(of.tolist()):
        members = (coarse.groups == cell).nonzero()[:, 0].tolist()
        assert members == sorted(i for part in set(mine) for i in (fine.groups == part).nonzero()[:, 0].tolist())
        assert mine == sorted(mine)


def test_card_of_arcs():
    """The ends exact, all of one length between them."""
    arc = Arc(16).requires_grad_(False)
    ends = F.normalize(arc.ends, dim=-1) * 4 * arc.length[:, None, None]  # (2, 2, 16)
    for i in (0, 1):
        for j in (0, 1):
            at = arc(torch.tensor([[float(i), float(j)]]))[0]
            torch.testing.assert_close(at, ends[0, i] + ends[1, j])
    along = torch.tensor([[t, 0.0] for t in (0.0, 0.2, 0.5, 0.9, 1.0)])
    rows = arc(along) - ends[1, 0]
    torch.testing.assert_close(rows.norm(dim=-1), torch.full((5,), 4 * float(arc.length[0])))
    steps = (rows[:-1] * rows[1:]).sum(-1) / rows[0].norm() ** 2  # angles in proportion
    whole = math.acos(float((rows[0] * rows[-1]).sum() / rows[0].norm() ** 2))
    for cosine, share in zip(steps.tolist(), (0.2, 0.3, 0.4, 0.1)):
        assert math.acos(cosine) == pytest.approx(whole * share, abs=1e-3)


def test_begins_as_the_mean_of_its_quarters():
    x, (coarse, fine, of) = torch.randn(2, 64, 8), wide_cells(8, 8, 4)
    out = Resampler(8, 6, 2, 3)(x, torch.randn(2, 64, 12), fine, of)
    for k in range(4):
        torch.testing.assert_close(out[:, k], x[:, coarse.groups == k].mean(1))  # quarters of one size


def test_by_loop():
    """Two heads, two levels, three layers: the deepest level first, then again from the deepest."""
    _, fine, of = wide_cells(4, 8, 2)
    module = stir(Resampler(128, 6, 2, 2)).double()
    x, seen = torch.randn(1, 32, 128).double(), torch.randn(1, 32, 12).double()
    everywhere = module.place(middles((4, 8)))
    at = torch.stack([(box.view(2, 2).float().mean(0) / torch.tensor([4, 8])) for box in fine.boxes])
    place, queries = module.place(at), []
    for k in range(8):
        mine = x[0, fine.groups == k]
        peak = torch.stack([F.gelu(module.up(module.norm(t))) for t in mine]).amax(0)
        queries.append(mine.mean(0) + module.propose(peak))
    z = torch.stack(queries)
    for layer, level in ((0, 1), (1, 0)):  # of each token its shallow channels, then its deep ones
        y = torch.stack([module.seen[level](t) for t in seen[0, :, 6 * level : 6 * level + 6]]) + everywhere
        for attention, source in ((module.among[layer], None), (module.across[layer], y)):
            normed = attention.norm(z) + place
            keys, values = attention.key_value(normed if source is None else attention.norm(source)).chunk(2, -1)
            rows = []
            for i, q in enumerate(attention.query(normed)):
                read = []
                for part in (slice(0, 64), slice(64, 128)):
                    share = (keys[:, part] @ q[part] / 8).softmax(0)
                    read.append(share @ values[:, part])
                rows.append(z[i] + attention.out(torch.cat(read)))
            z = torch.stack(rows)
        z = module.mlp[layer](z)
    expected = torch.stack([module.join(torch.cat([z[i] for i in mine])) for mine in of.tolist()])
    torch.testing.assert_close(module(x, seen, fine, of)[0], expected)


def test_gradients_are_those_of_finite_differences():
    _, fine, of = wide_cells(3, 5, 2)
    check_gradients(On(Resampler(8, 6, 2, 2), fine, of), torch.randn(2, 15, 8), torch.randn(2, 15, 12))


def test_knobs():
    with pytest.raises(ValueError, match="layers=0 must be"):
        fresh("llava").compress("texthawk", ratio=0.5, layers=0)
