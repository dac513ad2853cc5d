"""Invariants 3 and 10: a row of a padded batch is what it is alone; beams, samples and copies stay with their rows."""

import pytest
import torch

import hf_compress
from tests import tiny
from tests.invariants.reference import (
    VLMS,
    alone,
    batch_of,
    close,
    compressed,
    greedy,
    kernels,
    logits_of,
    matrix,
    shared,
    windows,
)
from tests.tiny import FAMILIES, GREEDY, IMG, PER_ROW


def batches(method, name, attn):
    """(kind, side) of the batches that make sense: all of them for methods that look at images."""
    if name not in VLMS:
        return [("text_only", "left"), ("text_only", "right")]
    both = [("inputs", "left"), ("inputs", "right")]
    if attn == "eager" or hf_compress.methods()[method].stage == "cache":
        return both
    return both + [(kind, "left") for kind in ("text_only", "mixed", "edges")] + [("mixed", "right")]


@kernels()
def test_padded_batch_is_one_by_one(method, name, attn):
    """Kept sets, forward logits (padded on either side) and every greedy step (left)."""
    model = shared(name, attn)
    for kind, side in batches(method, name, attn):
        batch = batch_of(name, kind, side)
        valid = batch["attention_mask"].bool()
        with compressed(model, method):
            together, last = logits_of(model, batch), model.compression.last
            run = greedy(model, batch) if side == "left" else None
            for row in range(2):
                sample = alone(name, batch, row)
                close(logits_of(model, sample)[0], together[row, valid[row]])
                single = model.compression.last
                held = [None if w is None else int(valid[row, 1 - w :].sum()) for w in windows(name)]
                stage = hf_compress.methods()[method].stage
                if side == "left" or stage not in ("decoder", "cache"):
                    held = []
                elif stage == "decoder":  # what is cut lines up at the right
                    whole = [tokens == valid.sum(1).tolist() for tokens in last.layer_tokens]
                    held = [w if uncut else None for w, uncut in zip(held, whole)]
                assert_same_sets(single, last, row, int(valid[row].long().argmax()), held)
                if run is not None:
                    close(greedy(model, sample).logits[0], run.logits[row])


LONGEST = {  # rows of which one is longer than the others after nothing of it has gone
    "text": [[1, 5, IMG, 7, 8, 9], [1, *range(3, 77)] + [*range(3, 77)] * 3],
    "cut": [[1, 11, 12, 13, 14], [1, 5, IMG, 7, IMG, 8, 9]],
    "cut, beside a longer text": [[1, 11, IMG, 13, 14, 15], [1, 5, IMG, 7, *range(20, 60)], [1, *range(3, 30)]],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("longest", LONGEST)
@matrix(names=VLMS)
def test_whatever_the_longest_row_loses(method, name, longest, side):
    """Logits of every real row, and the loss of each, are those of the row alone: no row but the longest sets the
    length of a batch, and it may lose all, some or nothing."""
    model = shared(name)
    batch = tiny.batch(name, model, LONGEST[longest], side=side)
    valid = batch["attention_mask"].bool()
    for changes in ({}, {"ratio": 0.0}) if hf_compress.methods()[method].stage == "decoder" else ({},):
        with compressed(model, method, **changes):
            together = logits_of(model, batch)
            for row in range(len(valid)):
                sample, at = alone(name, batch, row), valid[row]
                close(logits_of(model, sample)[0], together[row, at])
                labels = torch.full_like(batch["input_ids"], -100)
                labels[row, at.nonzero()[-2:, 0]] = sample["input_ids"][0, -2:]  # text: visual rows may go
                with torch.no_grad():
                    close(model(**batch, labels=labels).loss, model(**sample, labels=labels[row : row + 1, at]).loss)


@pytest.mark.parametrize("side", ["left", "right"])
@matrix("vision", names=VLMS)
def test_the_longest_row_shows_an_image_that_stays_whole(method, name, side):
    """`keep` is as large as the smaller image, whose row is the longest."""
    model = shared(name)
    batch = tiny.batch(name, model, [[1, 5, IMG, 7, 8], [1, 11, IMG, *range(20, 60)]], side=side)
    valid = batch["attention_mask"].bool()
    with compressed(model, method):
        logits_of(model, batch)
        most = [tokens for (tokens,) in model.compression.last.visual_tokens]
    with compressed(model, method, keep=min(most)):
        together = logits_of(model, batch)
        for row in range(2):
            close(logits_of(model, alone(name, batch, row))[0], together[row, valid[row]])


def assert_same_sets(single, together, row, offset, bounded=()):
    """What was kept of a sample alone and in row `row` of a batch, which starts at column `offset`.

    `bounded`: entries of layers with a window, which hold the newest slots of the batch: padding, behind a shorter row.
    """
    assert single.visual_kept == [together.visual_kept[row]]
    for mine, rows in zip(single.layer_index, together.layer_index):
        assert [i + offset for i in mine[0]] == rows[row]
    for i, (mine, entries) in enumerate(zip(single.cache_tokens, together.cache_tokens)):
        assert entries[row] == (bounded[i] if bounded and bounded[i] is not None else mine[0])


def stacked(name, parts):
    """Pixels (or sizes) of several samples."""
    if name in PER_ROW:  # rows with fewer images are filled up
        most = max(part.shape[1] for part in parts)
        parts = [torch.cat([p, p.new_zeros(1, most - p.shape[1], *p.shape[2:])], 1) for p in parts]
    return torch.cat(parts)


@matrix("vision")
def test_images_per_row_in_any_order(method, name):
    """The row with fewer images may come first, and rows may repeat."""
    model, batch = shared(name), batch_of(name)
    first, second = alone(name, batch, 0), alone(name, batch, 1)
    rows = [second, first, second]
    joined = tiny.pad([r["input_ids"][0].tolist() for r in rows])
    joined |= tiny.token_types(name, joined["input_ids"])
    for key in tiny.encoder_inputs(batch):
        joined[key] = stacked(name, [r[key] for r in rows])
    with compressed(model, method):
        run, last = greedy(model, joined), model.compression.last
        singles = []
        for sample in rows:
            singles.append(greedy(model, sample))
    for b, single in enumerate(singles):
        close(run.logits[b], single.logits[0])
    assert last.visual_kept[0] == last.visual_kept[2]


def beam_batch(name):
    """A ragged batch; on GLM with one image per row, see below."""
    if name not in FAMILIES["glm"]:
        return batch_of(name)
    return tiny.batch(name, shared(name), [[1, 5, IMG, 7, 8, 9], [1, 11, IMG, 13]])


@pytest.mark.parametrize("name", FAMILIES["glm"])
def test_beams_of_several_images_on_glm(name):
    """transformers gives the copies of a row images of one another: refused, not compressed."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, "uniform"), pytest.raises(ValueError, match="features and placeholders do not match"):
        model.generate(**batch, **GREEDY, num_beams=2)


@matrix()
def test_greedy_is_a_beam_of_one_and_beams_stay_in_their_rows(method, name):
    """Four beams of a batch are, per sample, the four beams of the sample alone."""
    model, batch = shared(name), beam_batch(name)
    beams = GREEDY | dict(num_beams=4, num_return_sequences=2, return_dict_in_generate=True, output_scores=True)
    length = batch["input_ids"].shape[1]
    with compressed(model, method):
        one = greedy(model, batch)
        assert torch.equal(model.generate(**batch, **GREEDY, num_beams=1), one.out.sequences)
        together = model.generate(**batch, **beams)
        for row in range(2):
            sample = alone(name, batch, row)
            single = model.generate(**sample, **beams)
            mine = slice(2 * row, 2 * row + 2)
            new = single.sequences[:, sample["input_ids"].shape[1] :]
            assert torch.equal(together.sequences[mine, length:], new)
            close(together.sequences_scores[mine], single.sequences_scores)


@matrix()
def test_beams_equal_beams_without_a_cache(method, name):
    """The cache follows its beams: the same as recomputing every beam from its tokens."""
    if hf_compress.methods()[method].stage == "cache":
        return recompute_beams(method, name)
    model, batch = shared(name), beam_batch(name)
    beams = GREEDY | dict(num_beams=3, return_dict_in_generate=True, output_scores=True)
    with compressed(model, method):
        cached, uncached = model.generate(**batch, **beams), model.generate(**batch, **beams, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    close(cached.sequences_scores, uncached.sequences_scores)


def recompute_beams(method, name):
    """Score of the best beam from a forced greedy run over its tokens."""
    model, batch = shared(name), beam_batch(name)
    beams = GREEDY | dict(num_beams=3, return_dict_in_generate=True, length_penalty=0.0)
    length, suppress = batch["input_ids"].shape[1], GREEDY["suppress_tokens"]
    with compressed(model, method):
        best = model.generate(**batch, **beams, output_scores=True)
        tokens = best.sequences[:, length:]
        forced = greedy(model, batch, prefix_allowed_tokens_fn=lambda b, ids: [int(tokens[b, len(ids) - length])])
    assert torch.equal(forced.tokens, tokens)
    logits = forced.logits.index_fill(-1, torch.tensor(suppress), float("-inf"))
    score = forced.logits.log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))
    assert logits.shape == forced.logits.shape
    close(best.sequences_scores, score)


@matrix()
def test_returned_sequences_are_the_samples_of_their_row(method, name):
    """Sampling several sequences per prompt is sampling from a batch of copies."""
    model, batch = shared(name), beam_batch(name)
    draw = GREEDY | dict(do_sample=True, top_k=5, num_return_sequences=3)
    with compressed(model, method):
        torch.manual_seed(0)
        out = model.generate(**batch, **draw)
        torch.manual_seed(0)
        assert torch.equal(out, model.generate(**batch, **draw))
        length = batch["input_ids"].shape[1]
        assert out.shape == (6, length + 5)
        assert torch.equal(out[:, :length], batch["input_ids"].repeat_interleave(3, 0))
        run = model.generate(
            **batch, **draw | dict(return_dict_in_generate=True, output_logits=True, top_k=1, temperature=1.0)
        )
        expected = greedy(model, batch)
    close(torch.stack(run.logits, 1), expected.logits.repeat_interleave(3, 0))
