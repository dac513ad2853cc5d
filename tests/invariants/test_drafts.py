"""Drafting: the compression proposes, the bare model decides; what comes out is what the bare model says."""

import copy
import threading

import pytest
import torch

from hf_compress.demo.dataset import load_scenes, prompt
from tests.ecosystem.cases import hooks
from tests.invariants.reference import VLMS, alone, batch_of, fresh, options, shared, windows
from tests.tiny import GREEDY, HYBRIDS, build

LONG = GREEDY | dict(max_new_tokens=12)
METHODS = [
    ["fastervlm"],
    ["visionzip"],
    ["fastv"],
    ["snapkv"],
    ["fastervlm", "snapkv"],
    ["visionzip", "fastv", "knorm"],
]


def says(model, sample, **kwargs):
    return model.generate(**sample, **{**LONG, **kwargs})


@pytest.fixture(scope="module")
def asked(demo):
    """Twenty questions, and what the uncompressed model answers, the end and what follows it."""
    model, processor = demo
    rows = load_scenes("test", images=5, questions=4)
    samples = [processor(images=r["image"], text=prompt(r["question"]), return_tensors="pt") for r in rows]
    run = dict(max_new_tokens=8, do_sample=False)
    return samples, {end: [model.generate(**s, **run, **eos(end)) for s in samples] for end in (True, False)}


def eos(end):
    return {} if end else {"eos_token_id": None}


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("methods", METHODS, ids="+".join)
def test_the_answers_are_those_of_the_uncompressed_model(methods, end, demo, asked):
    model, (samples, expected) = demo[0], asked
    run, other = dict(max_new_tokens=8, do_sample=False), 0
    with model.compressed(methods, ratio=[0.6 if m == "fastv" else 0.89 for m in methods]):
        with model.compression.drafting(tokens=4) as counts:
            for sample, answer in zip(samples, expected[end]):
                assert torch.equal(model.generate(**sample, **run, **eos(end)), answer)
        assert model.compression.last.prompt_tokens == [samples[-1]["input_ids"].shape[1]]  # of the drafts
        if not end:
            other = sum(
                not torch.equal(model.generate(**s, **run, **eos(end)), a) for s, a in zip(samples, expected[end])
            )
    said = sum(a.shape[1] - s["input_ids"].shape[1] for s, a in zip(samples, expected[end]))
    assert counts.accepted <= counts.drafted and counts.forwards <= said
    if not end:  # answers are a word or two; what follows them is drafted in part, and not what was said before
        assert 0 < counts.accepted < counts.drafted and counts.forwards < said and other > 0


@pytest.mark.parametrize("name", [*(n for n in VLMS if n not in HYBRIDS), "llama", "mistral_window", "qwen3"])
def test_every_architecture(name):
    model = shared(name)
    method = "snapkv" if name not in VLMS and not all(windows(name)) else "random"
    if name not in VLMS and method == "random":
        method = None
    for row in range(2):
        sample = alone(name, batch_of(name), row)
        expected = says(model, sample)
        if method is None:
            continue
        with model.compressed(method, **options(method, model)), model.compression.drafting() as counts:
            assert torch.equal(says(model, sample), expected)
        assert counts.drafted > 0


def test_a_padded_row():
    model, batch = shared("llava"), batch_of("llava")
    sample = {k: v[1:] if k != "pixel_values" else v[2:] for k, v in batch.items()}
    assert not sample["attention_mask"].all()
    expected = says(model, sample)
    with model.compressed(["fastervlm", "snapkv"], ratio=0.5, window=4), model.compression.drafting():
        assert torch.equal(says(model, sample), expected)


def test_what_is_asked_of_generate_counts():
    """Processors of logits shape drafts and answers; scores come along; the limit of length holds."""
    model, sample = shared("llava"), alone("llava", batch_of("llava"), 0)
    run = dict(repetition_penalty=1.3, no_repeat_ngram_size=2, return_dict_in_generate=True, output_logits=True)
    expected = says(model, sample, **run)
    with model.compressed("visionzip", ratio=0.5), model.compression.drafting(3) as counts:
        found = says(model, sample, **run)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
        assert says(model, sample, max_new_tokens=1).shape[1] == sample["input_ids"].shape[1] + 1
    assert counts.tokens == 3


def test_drafts_that_are_all_right():
    """At ratio 0 both say the same: every draft is accepted."""
    model, sample = shared("llava"), alone("llava", batch_of("llava"), 0)
    expected = says(model, sample)
    with model.compressed("fastervlm", ratio=0), model.compression.drafting(tokens=5) as counts:
        assert torch.equal(says(model, sample), expected)
    assert counts.accepted == counts.drafted == 9 and counts.forwards == 3


def test_outside_the_block_nothing_is_left():
    model, sample = fresh("llava"), alone("llava", batch_of("llava"), 0)
    model.compress("fastervlm", ratio=0.5)
    expected, before = says(model, sample), hooks(model)
    with pytest.raises(RuntimeError, match="stop"), model.compression.drafting():
        says(model, sample, stopping_criteria=[stop])
    assert hooks(model) == before and torch.equal(says(model, sample), expected)
    with model.compression.drafting(2) as outer:
        with model.compression.drafting(7) as inner:
            says(model, sample)
        assert outer.drafted == 0 < inner.drafted
        says(model, sample)
    assert outer.drafted > 0 and torch.equal(says(copy.deepcopy(model), sample), expected)


def stop(*_, **__):
    raise RuntimeError("stop")


def test_generate_inside_generate():
    model, sample, other = shared("llava"), *(alone("llava", batch_of("llava"), i) for i in (0, 1))
    expected, beside = says(model, sample), says(model, other)
    found = []

    def ask(ids, scores, **_):
        found.append(says(model, other))
        return torch.zeros(len(ids), dtype=torch.bool)

    with model.compressed(["fastervlm", "snapkv"], ratio=0.5, window=4), model.compression.drafting():
        assert torch.equal(says(model, sample, stopping_criteria=[ask]), expected)
    assert found and all(torch.equal(x, beside) for x in found)


def test_other_threads_decode_as_ever():
    model, sample, found = shared("llava"), alone("llava", batch_of("llava"), 0), []
    with model.compressed("fastervlm", ratio=0.5):
        expected = says(model, sample)
        with model.compression.drafting() as counts:
            thread = threading.Thread(target=lambda: found.append(says(model, sample)))
            thread.start()
            thread.join()
    assert torch.equal(found[0], expected) and counts.drafted == 0


@pytest.mark.parametrize(
    ("name", "method", "knobs", "message"),
    [
        ("llava", "tome", {}, "method='tome' acts before the features.*where='output'"),
        ("qwen2_5_vl", "downsample", {}, "method='downsample' acts before the features"),
        ("llama", "knorm", {"policy": "hold"}, "method='knorm' drops or packs entries.*policy='grow'"),
        ("llama", "kivi", {"group": 4, "residual": 4}, "method='kivi' drops or packs entries.*another cache method"),
    ],
)
def test_methods_that_cannot_draft(name, method, knobs, message):
    with build(name).compressed(method, ratio=0.3, **knobs) as model:
        with pytest.raises(ValueError, match=message), model.compression.drafting():
            pass
        assert model.compression.last is None


def test_tome_on_the_output_can():
    model, sample = shared("llava"), alone("llava", batch_of("llava"), 0)
    expected = says(model, sample)
    with model.compressed("tome", ratio=0.5, where="output"), model.compression.drafting():
        assert torch.equal(says(model, sample), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_return_sequences": 2, "do_sample": True}, "of 2 sequences"),
        ({"num_beams": 2}, "with num_beams=2"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens asks for candidates of another kind"),
        ({"prefill_chunk_size": 8}, "fed as a whole"),
        ({"cache_implementation": "static"}, "dynamic caches"),
    ],
)
def test_calls_that_cannot_be_checked(changes, message):
    model, sample = shared("llava"), alone("llava", batch_of("llava"), 0)
    with model.compressed("fastervlm", ratio=0.5), model.compression.drafting() as counts:
        with pytest.raises(ValueError, match=f"drafting: .*{message}"):
            says(model, sample, **changes)
        assert counts.forwards == 0


def test_batches_and_conversations_are_refused():
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed("fastervlm", ratio=0.5), model.compression.drafting():
        with pytest.raises(ValueError, match=r"of 2 sequences .* one sequence at a time"):
            says(model, batch)
        sample = alone("llava", batch, 0)
        first = model(**sample, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="holds tokens that the compressed model has not seen"):
            says(model, {"input_ids": sample["input_ids"], "past_key_values": first})


@pytest.mark.parametrize("tokens", [0, -1, 2.0, True, "5"])
def test_what_is_no_count(tokens):
    with (
        shared("llava").compressed("fastervlm", ratio=0.5) as model,
        pytest.raises(ValueError, match=f"tokens={tokens!r} must be an integer of at least 1"),
    ):
        model.compression.drafting(tokens)  # at the call, not when the block begins
