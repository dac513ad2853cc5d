"""Methods inside the vision tower: what they are shown, ragged answers and a memory, against towers written out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hf_compress.calibrate import merge_thresholds
from hf_compress.calibrate.merging import threshold
from hf_compress.engine.reduction import Rows, make_step
from hf_compress.methods.base import TowerMethod
from hf_compress.methods.vision.dymu import DyMU, merged_above
from hf_compress.methods.vision.flowcut import FlowCut, entropy, left, strength
from hf_compress.methods.vision.pixelprune import PixelPrune, surprise
from hf_compress.signals import EVERY, Assignment, Read
from hf_compress.tensors.merge import bipartite_above, proposals
from hf_compress.tensors.select import identity
from tests import tiny
from tests.invariants.merging import Spy, entered_by_hand, tower_by_hand
from tests.invariants.reference import adapter_of, bare, close, greedy, logits_of, shared, short_logits, unchanged
from tests.methods.test_vision_methods import ROWS, FakeBlock, X
from tests.toy import registered

TOWERS = ["llava", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@dataclass
class Ragged(TowerMethod):
    """Drops, or merges into the first patch, as many tokens as their numbers and the block say; counts differ."""

    merge: bool = False
    seen: ClassVar[list] = []

    adaptive: ClassVar[bool] = True

    def reads(self, depth):
        return {Read("tower", EVERY, "attention")}

    def assign(self, tokens, keep):
        return Assignment(identity(len(tokens), tokens.count, tokens.device))

    def reduce(self, block, keep):
        n, m = block.hidden.shape[:2]
        first = torch.arange(m).expand(n, m)
        born = block.memory.setdefault("born", first.clone())  # the place that each token had in the first block
        score = block.attention(surrogate="all").mean(1)
        self.seen.append((block, {rows: block.attention(rows=rows) for rows in ("mean", "all")}, born))
        if block.index == 2:
            return None
        skip = int(block.has_cls)  # [CLS] and the first patch stay
        stays = (first <= skip) | ((block.keys[..., 0] > block.keys[..., 1]) & (born % 7 != block.index))
        stays[:, skip:] |= score > 1.05 / m
        out = Assignment.selection(stays)
        if self.merge:
            K = out.kept.shape[1]
            real = torch.ones_like(out.kept, dtype=torch.bool) if out.valid is None else out.valid
            groups = torch.full((n, m), -1)
            for i in range(n):
                fill = int((~real[i]).sum())
                groups[i] = fill + skip
                groups[i, out.kept[i, fill:]] = torch.arange(fill, K)
            sizes = torch.zeros(n, K + 1).scatter_add(1, groups, block.sizes)
            out.groups, out.weight = groups, block.sizes / sizes.gather(1, groups)
        return out


def kept_and_logits(name, batch, **knobs):
    model = shared(name)
    with registered(Ragged), model.compressed("ragged", "adaptive", **knobs):
        Ragged.seen.clear()
        run = greedy(model, batch)
        return run, model.compression.last.visual_kept, list(Ragged.seen)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_ragged_counts_are_those_of_images_alone(name, merge):
    """Images that run side by side keep other counts, and each is what it is alone: tokens, memory and logits."""
    batch = tiny.inputs(name, bare(name))
    run, kept, seen = kept_and_logits(name, batch, merge=merge)
    assert len({len(k) for row in kept for k in row}) > 1
    for block, _, born in seen:
        assert block.memory["born"].shape == block.hidden.shape[:2] and bool((born.diff(dim=1) > 0).all())
    for row in range(2):
        sample = tiny.single(batch, row, name)
        alone, mine, _ = kept_and_logits(name, sample, merge=merge)
        assert mine == [kept[row]]
        close(run.logits[row], alone.logits[0])


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_against_a_tower_written_out(name, merge, monkeypatch):
    """One image: every block by hand, attention read from whole maps, and a language model on what is left."""
    ids = [[tiny.BOS, 5, tiny.IMG, 6, 7, 8]]
    sample = tiny.batch(name, bare(name), ids)
    model = shared(name)
    with registered(Ragged), model.compressed("ragged", "adaptive", merge=merge):
        spy = Spy(monkeypatch, model.compression.context.vision_method, "reduce")
        run, kept = greedy(model, sample), model.compression.last.visual_kept[0]
    by_hand, given = tower_by_hand(name, sample, spy.calls)
    assert kept == by_hand
    close(run.logits[0], short_logits(name, sample, run.tokens[0], kept, **given))


@pytest.mark.parametrize("name", TOWERS)
def test_attention_inside_the_tower(name, monkeypatch):
    """Rows of [CLS], of the mean patch and of all rows, from whole maps of the queries and keys, with ln(size)."""
    batch = tiny.inputs(name, bare(name))
    _, _, seen = kept_and_logits(name, batch, merge=True)
    assert any((block.sizes > 1).any() for block, _, _ in seen)
    for block, found, _ in seen:
        q, k, scaling = (x.double() if torch.is_tensor(x) else x for x in plain(block))
        skip, joined = int(block.has_cls), q.shape[2] // block.hidden.shape[1]
        bias = block.sizes.double().log().repeat_interleave(joined, 1)[:, None, None]
        whole = (q @ k.mT * scaling + bias).softmax(-1)
        one = (q[:, :, skip:].mean(2, keepdim=True) @ k.mT * scaling + bias).softmax(-1)
        for rows, wanted in (("all", whole.mean(2)), ("mean", one[:, :, 0])):
            wanted = wanted[..., skip:].unflatten(2, (-1, joined)).mean(-1)
            torch.testing.assert_close(found[rows].double(), wanted, atol=1e-5, rtol=1e-4)
    assert block.values.shape[:3] == (len(block.hidden), q.shape[1], block.hidden.shape[1])


def plain(block):
    """Queries and keys without the channel that holds ln(size)."""
    query, key, scaling = block._record
    d = block.values.shape[-1]
    return query[..., :d], key[..., :d], scaling


def refused(method, name, ratio, message):
    model = shared(name)
    with registered(method) as (key,), model.compressed(key, ratio), pytest.raises(ValueError, match=message):
        greedy(model, tiny.inputs(name, bare(name)))


def test_without_cls_a_surrogate_is_named():
    @dataclass
    class Pure(Ragged):
        """[CLS] or nothing."""

        def reduce(self, block, keep):
            block.attention()

    refused(Pure, "paligemma", "adaptive", r"no \[CLS\].*'pure'.*surrogate=None")


def test_a_count_that_was_not_asked_for_is_refused():
    refused(Ragged, "llava", 0.9, r"'ragged' left \d+ tokens of an image inside the tower instead of \d+")


def test_memory_of_another_shape_is_refused():
    @dataclass
    class Forgets(Ragged):
        """A number per image."""

        def reduce(self, block, keep):
            block.memory["mean"] = block.hidden.mean(dim=(1, 2))

    refused(Forgets, "llava", "adaptive", r"'forgets' keeps 'mean' of shape .* one row per token")


# -- the rows themselves -----------------------------------------------------------------------------------------------
def slow_step(rows, answers, x):
    """(R', D): crop by crop, token by token, row by row."""
    told, crops = {c: (a, i) for crops, a in answers for i, c in enumerate(crops)}, []
    for crop, count in enumerate(rows.counts):
        mine = x[rows.starts[crop] :][: rows.size(count)]
        tokens = [mine[i : i + 1] for i in range(rows.skip)] + list(mine[rows.skip :].split(rows.joined))
        if crop in told:
            answer, i = told[crop]
            new = []
            for k, token in enumerate(answer.kept[i].tolist()):
                if answer.valid is not None and not answer.valid[i, k]:
                    continue
                members = [token] if answer.groups is None else (answer.groups[i] == k).nonzero()[:, 0].tolist()
                share = [1 / len(members)] * len(members) if answer.weight is None else answer.weight[i, members]
                new.append((token, sum(w * tokens[j] for w, j in zip(share, members))))
            tokens = [t for _, t in (sorted(new, key=lambda pair: pair[0]) if rows.packed else new)]
        crops.append(torch.cat(tokens))
    most = 0 if rows.packed else max(map(len, crops))
    return torch.cat([torch.cat([c, torch.zeros(max(0, most - len(c)), x.shape[1])]) for c in crops])


def random_answer(g, n, m, skip, merge, ragged):
    keep = [int(torch.randint(skip + 1, m + 1, (1,), generator=g)) for _ in range(n)] if ragged else [m - 1] * n
    K = max(keep)
    kept, groups = torch.zeros(n, K, dtype=torch.int64), torch.full((n, m), -1)
    for i, count in enumerate(keep):
        order = skip + torch.randperm(m - skip, generator=g)[: count - skip]
        kept[i, K - count :] = torch.cat([torch.arange(skip), order])
        groups[i, skip:] = torch.randint(K - count + skip, K, (m - skip,), generator=g)
        groups[i, kept[i, K - count :]] = torch.arange(K - count, K)
    valid = torch.arange(K) >= K - torch.tensor(keep)[:, None] if ragged else None
    weight = torch.rand(n, m, generator=g) if merge == "weights" else None
    return Assignment(kept, groups if merge else None, weight, valid=valid)


@pytest.mark.parametrize("merge", [None, "means", "weights"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("skip", "joined"), [(0, 1), (1, 1), (0, 4), (1, 4)])
def test_steps_of_rows_against_loops(merge, ragged, packed, skip, joined):
    g = torch.Generator().manual_seed(0)
    for counts, told in [([7, 5, 7, 3], [[0, 2], [3]]), ([6, 6], [[0, 1]]), ([4, 4, 5], [[2]])]:
        rows = Rows(skip, joined, counts, packed)
        answers = [(c, random_answer(g, len(c), counts[c[0]], skip, merge, ragged)) for c in told]
        x = torch.randn(rows.starts[-1], 3, generator=g)
        step = make_step(rows, answers, x.device)
        real = torch.zeros(step.rows.starts[-1], dtype=torch.bool)
        for start, count in zip(step.rows.starts, step.rows.counts):
            real[start : start + rows.size(count)] = True
        want = slow_step(rows, answers, x)
        torch.testing.assert_close(step.apply(x)[real], want[real])
        back = step.spread(step.apply(x))
        for old, new in enumerate(step.into.tolist()):
            assert new < 0 or torch.equal(back[old], step.apply(x)[new])
        assert torch.equal(step.into[step.source[real]], real.nonzero()[:, 0])


# -- flowcut -----------------------------------------------------------------------------------------------------------
def flowed(counts, shares, keep, steps):
    """What is left behind each cut."""
    out = []
    for index in range(steps):
        rest = max(0, steps - 2) - index
        if rest >= 0 and rest % 2 == 0:
            (counts,) = left([shares], counts, keep, rest)
            out.append(counts)
    return out


def test_flowcut_card():
    a = ROWS[0].mean(0)[None]
    assert entropy(a).item() == pytest.approx(0.9130, abs=5e-5)
    assert left(entropy(a).tolist(), 6, 3, 1) == [6]
    sharp = torch.tensor([[0.7, 0.1, 0.05, 0.05, 0.05, 0.05]])
    assert entropy(sharp).item() == pytest.approx(0.6022, abs=5e-5) and left(entropy(sharp).tolist(), 6, 3, 1) == [4]
    assert flowed(576, 0.9, 64, 23) == [554, 532, 510, 487, 464, 440, 415, 388, 357, 318, 64]
    assert flowed(576, 0.7, 64, 23) == [518, 463, 412, 365, 321, 280, 241, 204, 168, 130, 64]
    assert flowed(576, 0.9, 192, 23) == [560, 544, 527, 510, 493, 475, 456, 436, 413, 383, 192]
    score = (a + torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.2, 0.1]])) * strength(X[None])
    torch.testing.assert_close(score, torch.tensor([[1.6, 3.15, 1.05, 1.44, 3.2, 1.32]]))


@dataclass
class Shown:
    """A block from tensors: values (n, H, m, d), rows (n, H, patches) of attention."""

    index: int
    steps: int
    has_cls: bool
    values: torch.Tensor
    rows: torch.Tensor
    memory: dict

    @property
    def hidden(self):
        return self.values[:, 0]

    def attention(self, *, rows="cls", surrogate=None):
        assert rows == "cls" and surrogate == "mean"
        return self.rows


def slow_flowcut(values, rows, before, memory):
    """Running scores of the patches of one image: values (H, m, d), rows (H, patches), token by token."""
    H, m, skip = len(values), values.shape[1], values.shape[1] - rows.shape[1]
    a = [float(sum(rows[h, j] for h in range(H))) / H for j in range(rows.shape[1])]
    s = [0.0] * len(a)
    for h in range(H if skip else 0):
        e = [math.exp(float(values[h, 0] @ values[h, j])) for j in range(m)]
        s = [x + e[j + 1] / sum(e) / H for j, x in enumerate(s)]
    a, s = ([x / sum(part) if sum(part) else 0 for x in part] for part in (a, s))
    flow = []
    for j in range(len(a)):
        v = [sum(float(values[h, j + skip, c]) for h in range(H)) / H for c in range(values.shape[2])]
        flow.append((a[j] + s[j]) * sum(map(abs, v)))
    return flow if before is None else [memory * b + (1 - memory) * f for b, f in zip(before, flow)]


@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize(("memory", "interval"), [(0.5, 2), (0.25, 1), (0, 3)])
def test_flowcut_against_loops(has_cls, memory, interval):
    g = torch.Generator().manual_seed(0)
    method, steps, keep, sharp = FlowCut(memory=memory, interval=interval), 6, 5, torch.tensor([1.0, 8.0])
    for image in range(2):  # one sharp in its attention, one not
        tokens, notes, before = list(range(20)), {}, None
        for index in range(steps):
            m = len(tokens) + has_cls
            values = torch.randn(1, 3, m, 4, generator=g)
            rows = (torch.randn(1, 3, len(tokens), generator=g) * sharp[image]).softmax(-1) * 0.8
            out = method.reduce(Shown(index, steps, has_cls, values, rows, notes), keep)
            if len(tokens) == keep:
                assert out is None
                continue
            before = slow_flowcut(values[0], rows[0], before, memory)
            assert notes["score"][0, has_cls:].tolist() == pytest.approx(before, rel=1e-4)
            rest = steps - 2 - index
            if rest < 0 or rest % interval:
                assert out is None
                continue
            a = rows[0].mean(0).double()
            a = a / a.sum()
            H = float(-(a * a.log()).sum()) / math.log(len(a))
            count = max(keep, len(a) - round((len(a) - keep) / math.sqrt(rest) * (1 - H * H))) if rest else keep
            stay = sorted(sorted(range(len(a)), key=lambda j: -before[j])[:count])
            assert out.kept[0].tolist() == [0] * has_cls + [j + has_cls for j in stay]
            notes = {"score": notes["score"].gather(1, out.kept)}
            tokens, before = [tokens[j] for j in stay], [before[j] for j in stay]
        assert len(tokens) == keep


@pytest.mark.parametrize(("knob", "bad"), [("memory", 1), ("memory", -0.1), ("interval", 0), ("where", "inside")])
def test_flowcut_knobs(knob, bad):
    with pytest.raises(ValueError, match=f"{knob}="):
        FlowCut(**{knob: bad})


# -- dymu --------------------------------------------------------------------------------------------------------------
def test_dymu_card():
    edge, _ = proposals(X[None])
    torch.testing.assert_close(edge, torch.tensor([[0.7589, 0.5367, 0.9414]]), atol=5e-5, rtol=0)
    assert [6 - bipartite_above(X[None], t)[1].shape[1] for t in (0.9, 0.7, 0.5)] == [1, 2, 3]
    assert threshold([edge[0], torch.tensor([0.95, 0.4, 0.2])], 2) == pytest.approx(0.7589, abs=5e-5)


def slow_above(x, cosine, skip):
    """Groups of one step as lists of members, A that stays first, then B."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    odd, stay = {j: [j] for j in range(1, len(x), 2)}, []
    for i in range(0, len(x), 2):
        best = max(odd, key=lambda j: (float(unit[i] @ unit[j]), -j)) if odd else None
        if i < skip or best is None or not unit[i] @ unit[best] > cosine:
            stay.append([i])
        else:
            odd[best].append(i)
    return [*stay, *(sorted(group) for group in odd.values())]


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("m", [1, 2, 7, 12])
def test_bipartite_above_against_loops(skip, m):
    x = torch.randn(4, m, 3, generator=torch.Generator().manual_seed(m))
    for cosine in (-1, 0.3, 0.8, 0.95, 1):
        groups, valid = bipartite_above(x, cosine, bool(skip))
        for i in range(4):
            wanted = slow_above(x[i], cosine, skip)
            fill = valid.shape[1] - len(wanted)
            assert valid[i].tolist() == [False] * fill + [True] * len(wanted)
            assert [(groups[i] == fill + k).nonzero()[:, 0].tolist() for k in range(len(wanted))] == wanted


def test_dymu_weighs_by_size():
    block = FakeBlock(0, 1, True, torch.tensor([[[0.0, 1], [1, 0], [1, 0.1], [0, 1]]] * 2), torch.ones(2, 4))
    block.hidden[1, 2] = torch.tensor([-1.0, 0])
    block.sizes[0, 1] = 3
    out = DyMU(threshold=0.9).reduce(block, None)
    assert out.valid.tolist() == [[False, True, True, True], [True] * 4]
    torch.testing.assert_close(out.weight[0], torch.tensor([1, 0.75, 0.25, 1]))
    assert out.kept[0, 1:].tolist() == [0, 1, 3] and out.kept[1].tolist() == [0, 2, 1, 3]
    assert DyMU(threshold=1).reduce(block, None) is None


def test_dymu_on_the_output_against_loops():
    x = torch.randn(3, 13, 4, generator=torch.Generator().manual_seed(1))
    out = merged_above(x, 0.6)
    assert out.valid is not None
    for i in range(3):
        groups = [[j] for j in range(13)]
        while True:
            means = torch.stack([x[i, group].mean(0) for group in groups])
            step = slow_above(means, 0.6, 0)
            if len(step) == len(groups):
                break
            groups = [sorted(j for k in part for j in groups[k]) for part in step]
        fill = out.kept.shape[1] - len(groups)
        assert out.kept[i, fill:].tolist() == sorted(group[0] for group in groups) and not out.valid[i, :fill].any()
        for k, group in enumerate(sorted(groups)):
            torch.testing.assert_close(out.apply(x)[i, fill + k], x[i, group].mean(0))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_dymu_by_what_was_measured(name, tmp_path):
    """Each image merges as alone, and over the images that were measured about as much as was asked for."""
    model, file, batch = tiny.build(name), tmp_path / "thresholds.json", tiny.inputs(name, bare(name))
    other = batch | {"pixel_values": batch["pixel_values"] * 0.8}  # a mean of two: no proposal lies on a threshold
    found = merge_thresholds(model, [batch, other], ratio=0.5, path=file, progress=False)
    assert len(found["thresholds"]) == len(adapter_of(name).tower_blocks(model)) and found["batches"] == 2
    assert min(found["thresholds"]) >= 0 and max(found["thresholds"]) < 1
    with model.compressed("dymu", "adaptive", thresholds_file=str(file)):
        run, last = greedy(model, batch), model.compression.last
        kept = last.visual_kept
        for row in range(2):
            alone = greedy(model, tiny.single(batch, row, name))
            assert model.compression.last.visual_kept == [kept[row]]
            close(run.logits[row], alone.logits[0])
    total = sum(map(sum, last.visual_tokens))
    assert abs(1 - sum(map(sum, last.visual_left)) / total - 0.5) < 0.2
    assert 0 < sum(map(sum, last.visual_left)) < total


def test_dymu_refusals(tmp_path):
    model, batch, file = tiny.build("llava"), tiny.inputs("llava", bare("llava")), tmp_path / "thresholds.json"
    with model.compressed("dymu", "adaptive"), pytest.raises(ValueError, match="nothing was measured"):
        greedy(model, batch)
    with unchanged(model), pytest.raises(ValueError, match=r"thresholds_file=.* does not exist"):
        model.compress("dymu", "adaptive", thresholds_file=str(file))
    merge_thresholds(tiny.build("paligemma"), [tiny.inputs("paligemma", bare("paligemma"))], ratio=0.5, path=file)
    with unchanged(model), pytest.raises(ValueError, match=r"measured on .*paligemma"):
        model.compress("dymu", "adaptive", thresholds_file=str(file))
    with model.compressed("dymu", "adaptive", where="output"), pytest.raises(ValueError, match="for the output"):
        greedy(model, batch)
    with pytest.raises(ValueError, match="there is none"):
        merge_thresholds(model, [], ratio=0.5, path=file)
    with pytest.raises(ValueError, match="thresholds_file="):
        merge_thresholds(model, [batch], ratio=0.5)
    with pytest.raises(ValueError, match="cannot be entered"):
        merge_thresholds(tiny.build("internvl"), [], ratio=0.5, path=file)
    for batches, message in (
        (5, "batches=int"),
        (batch, "batches=dict"),
        ([{}], r"batches\[0\] holds no pixel_values"),
        ([batch | {"pixel_values": batch["pixel_values"].int()}], "pixel_values has dtype torch.int32"),
        ([batch, batch | {"pixel_values": batch["pixel_values"] * torch.nan}], r"batches\[1\]: .* makes NaN"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            merge_thresholds(model, batches, ratio=0.5, path=file, progress=False)
    for knobs in ({"threshold": 2}, {"thresholds_file": 3}, {"where": "in"}):
        with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
            DyMU(**knobs)


# -- pixelprune --------------------------------------------------------------------------------------------------------
def cells(values):
    """(1, N, 1) pixels and the grid of a picture of one number per token."""
    picture = torch.tensor(values, dtype=torch.float32)
    return picture.reshape(1, -1, 1), tuple(picture.shape)


def test_pixelprune_card():
    square = torch.zeros(4, 4)
    square[1:3, 1:3] = 5
    kept = PixelPrune().stays(*cells(square.tolist()), None)
    assert kept.nonzero()[:, 1].tolist() == [0, 5, 7, 13]
    row = [[0, 0, 0.04, 0.08, 0.12]]
    assert PixelPrune(tau=0.05).stays(*cells(row), None).nonzero()[:, 1].tolist() == [0, 3]
    assert (surprise(torch.tensor(row)[None, ..., None], 0.05)[0, 0] > 0.05).nonzero()[:, 0].tolist() == [0]


def slow_pixelprune(picture, tau, anchor):
    """What foretells each token of a picture (h, w, C), cell by cell, and the difference; `anchor`: with what left."""
    h, w, _ = picture.shape
    seen, error = picture.clone(), torch.full((h, w), torch.inf)
    near = lambda x, y: float((x - y).abs().max()) <= tau
    for r in range(h):
        for c in range(w):
            if not r and not c:
                continue
            A, B, C = (
                (seen[r, c - 1] if c else None),
                (seen[r - 1, c] if r else None),
                seen[max(0, r - 1), max(0, c - 1)],
            )
            P = A if not r else B if not c else B if near(C, A) and not near(C, B) else A
            error[r, c] = (picture[r, c] - P).abs().max()
            if anchor and error[r, c] <= tau:
                seen[r, c] = P
    return error


@pytest.mark.parametrize("grid", [(1, 7), (7, 1), (4, 6), (5, 5), (1, 1)])
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_pixelprune_against_loops(grid, tau):
    h, w = grid
    pixels = torch.randint(0, 3, (3, h * w, 2), generator=torch.Generator().manual_seed(h)).float() * 0.25
    method = PixelPrune(tau=tau)
    for i in range(3):
        picture = pixels[i].view(h, w, 2)
        stays = slow_pixelprune(picture, tau, True).flatten() > tau
        assert torch.equal(method.stays(pixels, grid, None)[i], stays)
        error = slow_pixelprune(picture, tau, False).flatten().tolist()
        for keep in range(1, h * w + 1):
            wanted = sorted(sorted(range(h * w), key=lambda j: -error[j])[:keep])
            assert method.stays(pixels, grid, keep)[i].nonzero()[:, 0].tolist() == wanted


def flat(batch):
    """The same pictures with areas of one colour, more of the first one."""
    pixels = batch["pixel_values"].clone()
    if pixels.ndim == 2:  # rows of patches
        pixels[: len(pixels) // 2 // 4 * 4] = 0.25
        pixels[-8:] = 0.5
        return batch | {"pixel_values": pixels}
    real = pixels.flatten(-3).any(-1)  # images that are all zeros only fill up
    images = pixels[real]
    images[:, :, : images.shape[2] // 2] = 0.25
    images[:1, :, :, : images.shape[3] // 2] = 0.25
    pixels[real] = images
    return batch | {"pixel_values": pixels}


@pytest.mark.parametrize("name", [*TOWERS, "llava_next", "internvl", "smolvlm"])
def test_pixelprune_of_images_that_repeat_themselves(name):
    """Counts follow the pictures, each as alone; where nothing repeats the model says what it says, bit for bit."""
    model, batch = shared(name), tiny.inputs(name, bare(name))
    plain = logits_of(model, batch)
    with model.compressed("pixelprune", "adaptive"):
        assert torch.equal(logits_of(model, batch), plain)
        batch = flat(batch)
        run, last = greedy(model, batch), model.compression.last
        assert all(0 < a < b for left, whole in zip(last.visual_left, last.visual_tokens) for a, b in zip(left, whole))
        kept = last.visual_kept
        for row in range(2):
            alone = greedy(model, tiny.single(batch, row, name))
            assert model.compression.last.visual_kept == [kept[row]]
            close(run.logits[row], alone.logits[0])


@pytest.mark.parametrize("name", TOWERS)
def test_what_does_not_enter_is_not_seen(name):
    """A tower written out on the patches that enter, at their own positions."""
    ids = [[tiny.BOS, 5, tiny.IMG, 6, 7, 8]]
    sample = flat(tiny.batch(name, bare(name), ids))
    model = shared(name)
    with model.compressed("pixelprune", "adaptive"):
        run, (kept,) = greedy(model, sample), model.compression.last.visual_kept
    vectors = entered_by_hand(name, sample, kept)
    close(run.logits[0], short_logits(name, sample, run.tokens[0], kept, **vectors))


@pytest.mark.parametrize(("knob", "bad"), [("tau", -1), ("tau", "0"), ("where", "in")])
def test_pixelprune_knobs(knob, bad):
    with pytest.raises(ValueError, match=f"{knob}="):
        PixelPrune(**{knob: bad})


def test_what_is_admitted_is_checked():
    @dataclass
    class Odd(TowerMethod):
        """Indices in place of a mask."""

        def admit(self, patches, keep):
            return torch.arange(keep).expand(len(patches.pixels), -1)

    refused(Odd, "llava", 0.5, r"'odd' admits torch.int64 of shape .*bool \(n, N\)")
