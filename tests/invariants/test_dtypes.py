"""Every method in other precisions: weights, autocast, and whatever default dtype a program has set."""

import contextlib

import pytest
import torch

import hf_compress
from hf_compress.tensors.attention import attention_and_sums, column_sums, rows_attention
from tests import tiny
from tests.invariants.reference import UNEVEN, bare, batch_of, compressed, fresh, greedy, matrix, shared

MODELS = ["llama", "llava", "qwen2_5_vl"]
SHORT = dict(max_new_tokens=3)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(model, method, batch):
    with compressed(model, method):
        out, last = greedy(model, batch, **SHORT), model.compression.last
    return out, (last.layer_tokens, None if method in UNEVEN else last.cache_tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["f64", "bf16"])
@matrix(names=MODELS)
def test_the_default_dtype_changes_nothing(method, name, dtype):
    batch = batch_of(name)
    expected, counts = run(shared(name), method, batch)
    with default_dtype(dtype):
        out, same = run(shared(name), method, batch)
    assert same == counts and torch.equal(out.tokens, expected.tokens) and torch.equal(out.logits, expected.logits)
    assert torch.get_default_dtype() == torch.float32


@matrix(names=MODELS)
def test_autocast(method, name):
    """As many rows and entries as without it, in the dtype of the bare model; it is still on afterwards."""
    batch = batch_of(name)
    _, counts = run(shared(name), method, batch)
    with torch.autocast("cpu", torch.bfloat16):
        plain = greedy(bare(name, "sdpa"), batch, **SHORT)
        out, same = run(shared(name), method, batch)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert same == counts and out.logits.dtype == plain.logits.dtype and out.logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@matrix(names=MODELS)
def test_weights_of_half_precision(method, name, dtype):
    batch = batch_of(name)
    _, counts = run(shared(name), method, batch)
    model = fresh(name).to(dtype)
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    out, same = run(model, method, half)
    assert same == counts and out.logits.isfinite().all()


@pytest.mark.parametrize("how", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_attention_rows_are_as_exact_under_autocast(how):
    """What the model stored is read as it is, not rounded once more."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 8, generator=g) for heads in (4, 2, 2))
    rows, see = torch.ones(2, 9), lambda part: torch.ones(2, 1, part.stop - part.start, 9, dtype=torch.bool)

    def results():
        sums = column_sums(query, key, 0.3, see, rows)
        return rows_attention(query, key, 0.3, None), sums, *attention_and_sums(query, key, value, 0.3, see, rows)

    expected = results()
    with torch.autocast("cpu", how):
        given = results()
    assert all(torch.equal(x, y) for x, y in zip(given, expected, strict=True))


def test_a_model_in_double_precision():
    """Every method: scores of float32, whatever the model computes in."""
    model = tiny.build("llama").double()
    for method in hf_compress.methods("cache"):
        with compressed(model, method):
            model.generate(torch.randint(3, 80, (1, 40)), **tiny.GREEDY)
