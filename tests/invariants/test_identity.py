"""Invariants 1, 8 and 17: nothing changes at ratio 0, nothing is left behind, nobody sees another's compression."""

import copy
import threading

import pytest
import torch

from tests import tiny
from tests.invariants.reference import (
    NAMES,
    VLMS,
    FullLength,
    alone,
    assert_restored,
    bare,
    batch_of,
    close,
    compressed,
    fresh,
    greedy,
    kernels,
    logits_of,
    matrix,
    options,
    shared,
    short_logits,
    snapshot,
    unchanged,
)

BATCHES = [(name, "inputs") for name in NAMES]
BATCHES += [(name, kind) for name in VLMS for kind in ("mixed", "edges", "text_only")]
BATCHES += [(name, kind) for name in tiny.VIDEO for kind in ("video", "both")]


@pytest.mark.parametrize(("name", "kind"), BATCHES)
def test_the_reference_is_the_bare_model(name, kind):
    """With nothing removed the slow references give what plain generate gives, on a ragged batch."""
    batch = batch_of(name, kind)
    run = greedy(bare(name, "sdpa"), batch)
    full = FullLength(name, batch, run.tokens)
    close(run.logits, full.logits([full.causal(layer) for layer in range(full.layers)]))
    for row in range(2):
        whole = [list(range(len(image))) for image in full.images(row)]
        close(run.logits[row], short_logits(name, alone(name, batch, row), run.tokens[row], whole))


@kernels()
def test_ratio_zero_is_the_bare_model_bit_for_bit(method, name, attn):
    model, batch = shared(name, attn), batch_of(name)
    valid = batch["attention_mask"].bool()  # in eager attention rows of padding see all of it, which means nothing
    logits, run = logits_of(model, batch)[valid], greedy(model, batch)
    with compressed(model, method, ratio=0):
        assert torch.equal(logits_of(model, batch)[valid], logits)
        again = greedy(model, batch)
    assert torch.equal(again.tokens, run.tokens)
    assert torch.equal(again.logits, run.logits)


@matrix()
def test_decompress_restores_everything(method, name):
    """Also after forward and generate, and after an exception inside generate."""
    model, batch = fresh(name), batch_of(name)
    logits = logits_of(model, batch)
    greedy(model, batch)  # transformers installs hooks of its own at the first call
    before = snapshot(model)
    model.compress(method, **options(method, model))
    assert model.compression is not None and snapshot(model)["modules"] != before["modules"]
    logits_of(model, batch)
    greedy(model, batch)
    with pytest.raises(RuntimeError, match="boom"):
        greedy(model, batch, stopping_criteria=[boom])
    model.decompress()
    assert_restored(model, before)
    assert model.compression is None and "compression" not in vars(model)
    assert torch.equal(logits_of(model, batch), logits)


def boom(*args, **kwargs):
    raise RuntimeError("boom")


@matrix()
def test_an_exception_inside_a_forward_leaves_no_state(method, name):
    """A call that fails in the language model does not disturb the next one."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        expected = greedy(model, batch)
        handle = model.get_decoder().layers[2].register_forward_pre_hook(boom)
        for call in (greedy, logits_of):
            with pytest.raises(RuntimeError, match="boom"):
                call(model, batch)
        handle.remove()
        assert model.compression.context.state.forward is None
        again = greedy(model, batch)
    assert torch.equal(again.logits, expected.logits)


@matrix()
def test_a_context_ends_with_an_exception(method, name):
    model = shared(name)
    with unchanged(model), pytest.raises(RuntimeError, match="boom"), compressed(model, method):
        boom()


def test_a_failing_installation_is_undone(monkeypatch):
    """An error in the middle of compress() takes back what was installed by then."""
    from hf_compress.engine.undo import UndoLog

    model = fresh("llava")
    with unchanged(model):
        monkeypatch.setattr(UndoLog, "tap", boom)
        for method in ("fastervlm", "snapkv", "tome"):
            with pytest.raises(RuntimeError, match="boom"):
                model.compress(method, **options(method, model))


@matrix()
def test_the_callers_own_generate_comes_back(method, name):
    """An instance attribute `generate` (a user's wrapper) is restored."""
    model = fresh(name)

    def mine(*args, **kwargs):
        return type(model).generate(model, *args, **kwargs)

    model.generate = mine
    with compressed(model, method):
        pass
    assert vars(model).get("generate") is mine


@pytest.mark.parametrize(
    ("method", "name"),
    [("divprune", "llava"), ("fastv", "qwen2_5_vl"), ("snapkv", "llama"), ("h2o", "llama"), ("streaming", "llava")],
)
def test_nothing_is_kept_of_a_generate(method, name):
    """No layout of a decode step outlives generate: what stays does not grow with the number of new tokens."""
    import gc

    from hf_compress.layout import Layout

    model, batch = fresh(name), batch_of(name)
    model.compress(method, **options(method, model))

    def alive(steps):
        model.generate(**batch, max_new_tokens=steps, do_sample=False)
        gc.collect()
        return sum(type(o) is Layout for o in gc.get_objects())

    few = alive(3)
    assert alive(12) <= few


@matrix()
def test_copies_are_independent(method, name):
    """A deep copy is compressed by itself: decompressing it leaves the original compressed, and the reverse."""
    model, batch = fresh(name), batch_of(name)
    plain = greedy(model, batch).logits
    model.compress(method, **options(method, model))
    expected = greedy(model, batch).logits
    twin = copy.deepcopy(model)
    assert twin.compression is not model.compression and twin.compression.context.model is twin
    assert torch.equal(greedy(twin, batch).logits, expected)
    twin.decompress()
    assert torch.equal(greedy(twin, batch).logits, plain)
    assert torch.equal(greedy(model, batch).logits, expected)
    other = copy.deepcopy(model)
    model.decompress()
    assert torch.equal(greedy(other, batch).logits, expected)


def test_two_threads_do_not_see_each_other():
    """Two models, compressed differently and running at once, give what each gives alone."""
    jobs = [("fastervlm", "llava"), ("fastv", "llava"), ("snapkv", "llama"), ("divprune", "qwen2_5_vl")]
    models = [fresh(name) for _, name in jobs]
    for model, (method, _) in zip(models, jobs):
        model.compress(method, **options(method, model))
    expected = [greedy(m, batch_of(name)).logits for m, (_, name) in zip(models, jobs)]
    results, start = [[] for _ in jobs], threading.Barrier(len(jobs))

    def work(i):
        start.wait()
        for _ in range(4):
            results[i].append(greedy(models[i], batch_of(jobs[i][1])).logits)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected):
        assert len(got) == 4 and all(torch.equal(g, want) for g in got)


@matrix()
def test_two_threads_share_one_model(method, name):
    """Two prompts through one compressed model at once."""
    model, batch = shared(name), batch_of(name)
    samples = [alone(name, batch, row) for row in range(2)]
    with compressed(model, method):
        expected = [greedy(model, sample).logits for sample in samples]
        results, start = [[], []], threading.Barrier(2)

        def work(i):
            start.wait()
            for _ in range(3):
                results[i].append(greedy(model, samples[i]).logits)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for got, want in zip(results, expected):
        assert len(got) == 3 and all(torch.equal(g, want) for g in got)


def test_nested_contexts_of_two_models():
    a, b = shared("llava"), shared("qwen2_5_vl")
    batch_a, batch_b = batch_of("llava"), batch_of("qwen2_5_vl")
    with compressed(a, "uniform"):
        only_a = logits_of(a, batch_a)
        with compressed(b, "fastv"):
            assert torch.equal(logits_of(a, batch_a), only_a)
            both = logits_of(b, batch_b)
        assert not torch.equal(logits_of(b, batch_b), both)
        assert torch.equal(logits_of(a, batch_a), only_a)
    assert not torch.equal(logits_of(a, batch_a), only_a)


@matrix()
def test_compression_changes_the_answer(method, name):
    """The other tests could not fail if a compressed tiny model gave what the bare one gives."""
    model, batch = shared(name), batch_of(name)
    plain = greedy(model, batch).logits
    with compressed(model, method):
        assert (greedy(model, batch).logits[:, -1] - plain[:, -1]).abs().max() > 0.1
