"""Methods inside the vision tower: what they are shown, ragged answers and a memory, against towers written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hf_compress.engine.reduction import Rows, make_step
from hf_compress.methods.base import TowerMethod
from hf_compress.signals import EVERY, Assignment, Read
from hf_compress.tensors.select import identity
from tests import tiny
from tests.invariants.merging import Spy, tower_by_hand
from tests.invariants.reference import bare, close, greedy, shared, short_logits
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
