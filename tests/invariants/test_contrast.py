"""Contrasting: the uncompressed model speaks against the compressed one, on every architecture, in batches."""

import math
import threading

import numpy as np
import pytest
import torch

from tests import tiny
from tests.architectures.helpers import next_turn
from tests.ecosystem.cases import hooks
from tests.invariants.reference import VLMS, alone, batch_of, close, fresh, greedy, options, shared, unchanged
from tests.tiny import GREEDY

RUN = GREEDY | dict(max_new_tokens=5, return_dict_in_generate=True, output_scores=True, output_logits=True)


def said(model, batch, **more):
    return model.generate(**batch, **{**RUN, **more})


def forced(model, batch, tokens):
    """(B, n, V) logits of a model that is made to say these tokens."""
    length = batch["input_ids"].shape[1]
    force = lambda b, ids: [int(tokens[b, len(ids) - length])]
    return torch.stack(said(model, batch, prefix_allowed_tokens_fn=force).logits, 1)


def by_hand(full, negative, alpha, beta):
    """Number by number, of (V,) logits."""
    out = []
    best = max(full)
    for l, other in zip(full, negative):
        out.append((1 + alpha) * l - alpha * other if l >= best + math.log(beta) else -math.inf)
    return out


def follows(model, batch, methods, alpha=2.0, beta=0.1, **knobs):
    """What is decoded in a block against both models alone, made to say the same; returns the tokens."""
    model.compress(methods, **knobs)
    try:
        with model.compression.contrasting(alpha, beta):
            out = said(model, batch)
        tokens = out.sequences[:, batch["input_ids"].shape[1] :]
        negative = forced(model, batch, tokens)
        last = model.compression.last
    finally:
        model.decompress()
    full = forced(model, batch, tokens)
    close(torch.stack(out.logits, 1), full)
    full[..., GREEDY["suppress_tokens"]] = -math.inf  # what the config asks for comes first
    for b in range(len(tokens)):
        for step in range(tokens.shape[1]):
            expected = torch.tensor(by_hand(full[b, step].tolist(), negative[b, step].tolist(), alpha, beta))
            found = out.scores[step][b]
            close_by = (full[b, step] - full[b, step].max() - math.log(beta)).abs() > 1e-3  # else rounding decides
            assert torch.equal(found.isinf()[close_by], expected.isinf()[close_by])
            real = ~(found.isinf() | expected.isinf())
            close(found[real], expected[real], atol=1e-3)
            assert int(tokens[b, step]) == int(found.argmax())
    return tokens, last


@pytest.mark.parametrize("name", VLMS)
def test_every_architecture(name):
    model, batch = shared(name), batch_of(name, "equal" if name in tiny.HYBRIDS else "inputs")
    before = greedy(model, batch).tokens
    tokens, last = follows(model, batch, "fastervlm", ratio=0.75)
    assert last.visual_left == [[max(1, round(n / 4)) for n in row] for row in last.visual_tokens]
    assert before.shape[1] >= 4 and tokens.shape[1] == 5


@pytest.mark.parametrize(
    "methods", [["visionzip"], ["random", "snapkv"], ["fastv"], ["fastervlm", "fastv", "knorm"]], ids="+".join
)
def test_any_method_can_be_the_negative(methods):
    model = shared("llava")
    many = [options(m, model) for m in methods]
    knobs = {k: v for mine in many for k, v in mine.items() if k != "ratio"}
    follows(model, batch_of("llava"), methods, ratio=[mine.get("ratio", 0.5) for mine in many], **knobs)


def test_alpha_and_beta():
    """Without either the bare model speaks, where beta asks for its best alone too."""
    model, batch = shared("llava"), batch_of("llava")
    bare = said(model, batch).sequences
    with model.compressed("fastervlm", keep=1):
        for alpha, beta in ((0, 1e-9), (50, 1)):
            with model.compression.contrasting(alpha, beta):
                assert torch.equal(said(model, batch).sequences, bare)
        with model.compression.contrasting(20, 1e-9):
            assert not torch.equal(said(model, batch).sequences, bare)
    follows(model, batch, "fastervlm", alpha=np.float32(0.7), beta=torch.tensor(0.02), keep=2)


def test_without_a_cache_and_one_by_one():
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("fastervlm", 0.75), model.compression.contrasting():
        tokens = said(model, batch).sequences[:, -5:]
        assert torch.equal(said(model, batch, use_cache=False).sequences[:, -5:], tokens)
        for row in range(2):
            assert torch.equal(said(model, alone("llava", batch, row)).sequences[0, -5:], tokens[row])


def test_sampling_and_what_else_is_asked_of_generate():
    """Several answers per prompt; processors of the caller see what is decoded with."""
    model, batch, seen = shared("llava"), batch_of("llava"), []

    def note(ids, scores):
        seen.append(scores)
        return scores

    with model.compressed("fastervlm", 0.75), model.compression.contrasting():
        out = said(model, batch, do_sample=True, num_return_sequences=3, logits_processor=[note], max_new_tokens=3)
    assert out.sequences.shape[0] == 6 and len(seen) == 3
    for scores, logits in zip(seen, out.logits):
        assert scores.shape == logits.shape and bool(scores.isinf().any()) and not torch.equal(scores, logits)


def test_outside_the_block_nothing_is_left():
    model, batch = fresh("llava"), batch_of("llava")
    model.compress("fastervlm", ratio=0.75)
    expected, before = said(model, batch).sequences, hooks(model)

    def stop(ids, scores, **kwargs):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), model.compression.contrasting():
        said(model, batch, stopping_criteria=[stop])
    assert hooks(model) == before and torch.equal(said(model, batch).sequences, expected)
    with model.compression.contrasting(alpha=20), model.compression.drafting():
        sample = alone("llava", batch, 0)
        inner = said(model, sample).sequences  # the inner block rules: what the bare model says
    other = []
    with model.compression.contrasting(alpha=20):
        thread = threading.Thread(target=lambda: other.append(said(model, batch).sequences))
        thread.start()
        thread.join()
        assert torch.equal(other[0], expected)  # a block is of its thread
    model.decompress()
    assert torch.equal(inner, said(model, sample).sequences)


@pytest.mark.parametrize(
    ("knobs", "call", "message"),
    [
        (dict(alpha=-1), {}, "alpha=-1 must be a number of at least 0"),
        (dict(beta=0), {}, "beta=0 must be a number above 0 and at most 1"),
        ({}, dict(num_beams=2), "contrasting: num_beams=2"),
        ({}, dict(prompt_lookup_num_tokens=2), "contrasting: prompt_lookup_num_tokens asks for candidates"),
        ({}, dict(cache_implementation="static"), "contrasting: the prompt is fed as a whole into dynamic caches"),
        ({}, dict(prefill_chunk_size=4), "contrasting: the prompt is fed as a whole"),
    ],
)
def test_what_cannot_be_contrasted(knobs, call, message):
    model, batch = shared("llava"), batch_of("llava")
    refused = pytest.raises(ValueError, match=message)
    with model.compressed("fastervlm", 0.5), unchanged(model), refused, model.compression.contrasting(**knobs):
        said(model, batch, **call)


def test_methods_that_change_the_features_are_refused():
    model = shared("llava")
    with model.compressed("tome", 0.5), pytest.raises(ValueError, match="contrasting: method='tome' acts before"):
        model.compression.contrasting()


def test_a_second_turn_is_refused():
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("fastervlm", 0.5):
        run = greedy(model, batch)
        turn = next_turn(batch, run.out, [7, 8])
        with model.compression.contrasting(), pytest.raises(ValueError, match="contrasting: past_key_values holds"):
            model.generate(**turn, past_key_values=run.cache, max_new_tokens=3)
