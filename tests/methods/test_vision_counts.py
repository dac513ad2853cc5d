"""Answers of different lengths: what a vision method may decide when nobody gives it a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import hf_compress
from hf_compress.methods.base import VisionMethod
from hf_compress.signals import Assignment
from tests import tiny
from tests.architectures.helpers import next_turn
from tests.invariants.language import bare, image_embeddings, short_logits
from tests.invariants.reference import alone, batch_of, close, greedy, logits_of, shared, unchanged
from tests.tiny import BOS, IMG
from tests.toy import registered

NAMES = ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3"]


@dataclass
class Loud(VisionMethod):
    """The tokens that are louder than the mean of their image, quiet ones merged into the one before."""

    merging: bool = False
    junk: int = 0  # what stands in the slots that only fill up

    adaptive: ClassVar[bool] = True

    def assign(self, tokens, keep):
        norm = tokens.embeddings.float().norm(dim=-1)
        if keep is not None:
            return Assignment(norm.topk(keep).indices.sort(1).values)
        stays = norm > norm.mean(1, keepdim=True)
        answer = Assignment.selection(stays)
        if answer.valid is not None:
            answer.kept = torch.where(answer.valid, answer.kept, self.junk)
        if self.merging:
            fillers = 0 if answer.valid is None else (~answer.valid).sum(1, keepdim=True)
            last = stays.cumsum(1) - 1  # of what stays; what comes before the first goes to nobody
            answer.groups = torch.where(last < 0, last, last + fillers)
        return answer


def by_hand(name, sample, merging):
    """Kept tokens and what stands there per image of one sample, token by token."""
    kept, vectors = [], []
    for x in image_embeddings(name, sample):
        norms = [float(row.norm()) for row in x]
        mine = [i for i, norm in enumerate(norms) if norm > sum(norms) / len(norms)]
        ends = [*mine[1:], len(x)] if merging else [i + 1 for i in mine]
        kept.append(mine)
        vectors.append(torch.stack([x[i:end].mean(0) for i, end in zip(mine, ends)]))
    return kept, vectors


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("merging", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_image_keeps_what_it_would_alone(name, merging, side):
    model, batch = shared(name), batch_of(name, side=side)
    with registered(Loud), model.compressed("loud", "adaptive", merging=merging):
        got, last = logits_of(model, batch), model.compression.last
        assert last.layer_tokens[0] == [n - a + b for n, a, b in zip(last.prompt_tokens, *totals(last))]
        assert "ratio=adaptive" in str(model.compression.report())
        alone_ = [greedy(model, alone(name, batch, row)) for row in range(2)]
        for row in range(2):
            sample = alone(name, batch, row)
            kept, vectors = by_hand(name, sample, merging)
            assert last.visual_kept[row] == kept
            expected = short_logits(name, sample, alone_[row].tokens[0], kept, vectors)
            close(alone_[row].logits[0], expected)
            at = int(batch["attention_mask"][row].nonzero()[-1])
            close(got[row, at], expected[0])
    assert len({len(k) for row in last.visual_kept for k in row}) > 1


def totals(last):
    return [[sum(images) for images in counts] for counts in (last.visual_tokens, last.visual_left)]


def test_slots_that_fill_up_mean_nothing():
    model, batch = shared("llava"), batch_of("llava")
    found = []
    with registered(Loud):
        for junk in (0, 17, 35):
            with model.compressed("loud", "adaptive", merging=True, junk=junk):
                found.append((logits_of(model, batch), model.compression.last.visual_kept))
    assert all(torch.equal(x, found[0][0]) and kept == found[0][1] for x, kept in found)


@pytest.mark.parametrize("seed", range(10))
def test_what_stays_whatever_fills_up(seed):
    g = torch.Generator().manual_seed(seed)
    stays = torch.rand(4, 12, generator=g) < torch.rand(4, 1, generator=g)
    answer = Assignment.selection(stays)
    assert torch.equal(answer.stays(12), stays)
    if answer.valid is not None:
        for junk in range(12):
            answer.kept = torch.where(answer.valid, answer.kept, junk)
            assert torch.equal(answer.stays(12), stays)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_generate_in_all_its_ways(name):
    """Beams, chunks, static caches and a second turn: the same answers as one by one."""
    model, batch = shared(name), batch_of(name)
    with registered(Loud), model.compressed("loud", "adaptive"):
        run = greedy(model, batch)
        kept = model.compression.last.visual_kept
        assert torch.equal(greedy(model, batch, prefill_chunk_size=11).tokens, run.tokens)
        assert torch.equal(greedy(model, batch, cache_implementation="static").tokens, run.tokens)
        beams = model.generate(**batch, max_new_tokens=4, num_beams=2, do_sample=False)
        assert model.compression.last.visual_kept == [row for row in kept for _ in range(2)]
        for row in range(2):
            one = model.generate(**alone(name, batch, row), max_new_tokens=4, num_beams=2, do_sample=False)
            assert torch.equal(beams[row, -4:], one[0, -4:])
        second = both_turns(model, batch)
        for row in range(2):
            assert torch.equal(both_turns(model, alone(name, batch, row))[0], second[row])


def both_turns(model, batch):
    """(B, 3) tokens of a second turn."""
    run = greedy(model, batch)
    turn = next_turn(batch, run.out, [7, 8])
    return model.generate(**turn, past_key_values=run.cache, max_new_tokens=3, do_sample=False)[:, -3:]


def test_crops_of_an_image_decide_one_by_one():
    model, batch = shared("llava_next"), batch_of("llava_next")
    with registered(Loud), model.compressed("loud", "adaptive"):
        whole = greedy(model, batch)
        kept = model.compression.last.visual_kept
        for row in range(2):
            sample = alone("llava_next", batch, row)
            assert torch.equal(greedy(model, sample).tokens[0], whole.tokens[row])
            assert model.compression.last.visual_kept == [kept[row]]


def test_gradient_of_ragged_merges():
    model, batch = tiny.build("llava"), tiny.batch("llava", bare("llava"), [[BOS, 5, IMG, IMG, 8, 9]])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMG, -100)
    with registered(Loud), model.compressed("loud", "adaptive", merging=True):
        model(**batch, labels=labels).loss.backward()
    assert float(model.model.multi_modal_projector.linear_1.weight.grad.norm()) > 0


def test_config_and_second_stage():
    model, batch = shared("llava"), batch_of("llava")
    with registered(Loud):
        with model.compressed(["loud", "snapkv"], ["adaptive", 0.5], window=4):
            config = model.compression.config
            first = greedy(model, batch)
        again = hf_compress.CompressionConfig.from_json(config.to_json())
        assert again == config and again.methods[0].ratio == "adaptive"
        with model.compressed(again):
            assert torch.equal(greedy(model, batch).tokens, first.tokens)
        with model.compressed(["loud", "fastv"], ["adaptive", 0.4], layer=1):
            greedy(model, batch)
            left = model.compression.last.visual_left
            assert all(n < 36 for row in left for n in row)


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        ("fastervlm", dict(ratio="adaptive"), r"ratio='adaptive'.*'fastervlm' has no rule.*'loud'"),
        ("snapkv", dict(ratio="adaptive"), r"ratio='adaptive'.*'snapkv' has no rule"),
        ("loud", dict(ratio="adaptive", keep=9), r"both of ratio='adaptive' and keep=9"),
        ("loud", dict(ratio="auto"), r"ratio='auto'.*number"),
        ("loud", dict(), r"neither"),
    ],
)
def test_refusals(method, kwargs, message):
    model = shared("llava")
    with registered(Loud), unchanged(model), pytest.raises(ValueError, match=f"(?s){message}"):
        model.compress(method, **kwargs)


@dataclass
class Wrong(VisionMethod):
    """Answers that were not asked for."""

    kind: str = "more"

    adaptive: ClassVar[bool] = True

    def assign(self, tokens, keep):
        n = len(tokens)
        kept = {"more": (n, (keep or 0) + 1), "flat": (n * 9,), "rows": (n + 1, 9)}.get(self.kind, (n, keep or 9))
        valid = torch.ones(n, 2, dtype=torch.bool) if self.kind == "valid" else None
        if self.kind in ("none", "groups", "outside", "fewer"):
            kept = torch.arange(keep or 9).repeat(n, 1)
            groups = torch.zeros(n, 3, dtype=torch.long) if self.kind == "groups" else None
            real = kept > 4 if self.kind == "fewer" else None
            return None if self.kind == "none" else Assignment(kept + 30 * (self.kind == "outside"), groups, valid=real)
        return Assignment(torch.zeros(kept, dtype=torch.long), valid=valid)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "answered with NoneType"),
        ("groups", r"answered groups of shape .*it must be \(3, 36\)"),
        ("twice", "each once, 18 of each sequence"),
        ("outside", "indices below 36"),
        ("fewer", "18 of each sequence"),
    ],
)
def test_answers_that_cannot_be_carried_out_are_refused(kind, message):
    model = shared("llava")
    refused = pytest.raises(ValueError, match=f"method='wrong' .*{message}")
    with registered(Wrong), model.compressed("wrong", 0.5, kind=kind), refused:
        model(**batch_of("llava"))


@pytest.mark.parametrize("kind", ["more", "flat", "rows", "valid"])
def test_answers_of_another_shape_are_refused(kind):
    model = shared("llava")
    refused = pytest.raises(ValueError, match=r"method='wrong' answered kept of shape.*that keep 18")
    with registered(Wrong), model.compressed("wrong", 0.5, kind=kind), refused:
        model(**batch_of("llava"))
