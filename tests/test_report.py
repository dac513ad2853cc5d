"""What reports say, held to caches of bare models and to sums over the real tokens."""

import re

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from hf_compress.report import layer_flops
from tests import tiny
from tests.invariants.reference import bare, batch_of, compressed, shared

LENGTH, WINDOW = 60, 16


def cache_of(out):
    return getattr(out, "cache", None) or out.past_key_values


def held(cache):
    """Bytes of keys and values that each layer gives away."""
    return [sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)) for layer in cache.layers]


@pytest.fixture(scope="module")
def sliding():
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=kinds,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(config).eval()


def prompt(length=LENGTH, rows=1):
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("method", ["snapkv", "streaming"])
def test_layers_with_sliding_windows(sliding, method):
    """The whole is what the bare cache holds, what is left is stored: windows are bounded already after the prompt."""
    whole = sum(held(cache_of(sliding(prompt(), use_cache=True))))
    with sliding.compressed(method, keep=20, **({"window": 4} if method == "snapkv" else {})):
        cache = cache_of(sliding(prompt(), use_cache=True))
        totals, last = sliding.compression.report().totals(), sliding.compression.last
    assert totals["full_kv_bytes"] == whole
    assert last.cache_tokens == [[WINDOW - 1]] * 3 + [[20]]
    stored = [layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes() for layer in cache.layers]
    assert stored == held(cache)
    assert totals["kv_bytes"] - sum(stored) == 20 * 2  # and which entries they are


@torch.no_grad()
def test_a_window_that_has_let_go_cannot_be_cropped(sliding):
    with sliding.compressed("snapkv", 0.5, window=4):
        cache = cache_of(sliding(prompt(), use_cache=True))
        with pytest.raises(ValueError, match=r"crop\(-3\): .*window of 16 has let go"):
            cache.layers[0].crop(-3)
        short = cache_of(sliding(prompt(10), use_cache=True))  # nothing has left this one
        short.layers[1].crop(-3)  # by itself: the first one stands for its cache
        assert short.layers[1].keys.shape[2] == 7


@torch.no_grad()
def test_candidates_are_no_prompt():
    """Lookup decoding checks many rows at once; the report still speaks of the prompt."""
    model, ids = shared("llama"), prompt(10).repeat(1, 5)
    with model.compressed("snapkv", 0.75, window=4):
        model.generate(ids, max_new_tokens=8, do_sample=False)
        plain = model.compression.report().totals()
        model.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=4)
        assert model.compression.report().totals() == plain


@torch.no_grad()
def test_a_further_turn():
    """Its own tokens, the bytes of the whole cache, and attention to what was there before."""
    model, ids = shared("llama"), prompt(40)
    with model.compressed("snapkv", 0.5, window=4):
        cache = cache_of(model(ids[:, :30], use_cache=True))
        first = model.compression.report().totals()
        model(ids[:, 30:], past_key_values=cache, use_cache=True)
        totals, rows = model.compression.report().totals(), model.compression.report().rows()
        text = str(model.compression.report())
    assert (first["prompt_tokens"], first["earlier_tokens"]) == (30, 0)
    assert (totals["prompt_tokens"], totals["earlier_tokens"]) == (10, 30)
    assert totals["full_kv_bytes"] == sum(held(cache_of(bare("llama")(ids, use_cache=True))))
    assert totals["kv_bytes"] == sum(layer.nbytes() for layer in cache.layers)
    config, layers = model.config, model.config.num_hidden_layers
    assert totals["full_gflops"] * 1e9 == pytest.approx(
        layers * (layer_flops(config, 40) - layer_flops(config, 30)), rel=0.01
    )
    assert all(r["gflops"] * 1e9 == pytest.approx(layer_flops(config, 10, 15)) for r in rows)
    assert "(after 30 of earlier turns)" in text


@torch.no_grad()
def test_a_prompt_of_one_token():
    model = shared("llama")
    with model.compressed("streaming", 0.5):
        model(prompt(20))
        model.generate(prompt(1), max_new_tokens=2, do_sample=False)
        assert model.compression.report().totals()["prompt_tokens"] == 1


@torch.no_grad()
@pytest.mark.parametrize("method", ["snapkv", "streaming", "adakv", "kivi"])
def test_bytes_that_fill_up_shorter_rows(method):
    """What a batch holds beyond what its real entries need."""
    model, batch = shared("llama"), batch_of("llama")
    with compressed(model, method):
        cache = cache_of(model(**batch, use_cache=True))
        totals = model.compression.report().totals()
        text = str(model.compression.report())
        alone = [tiny.single(batch, row, "llama") for row in range(2)]
        real = []
        for sample in alone:
            model(**sample, use_cache=True)
            real.append(model.compression.report().totals())
    assert totals["kv_bytes"] == sum(layer.nbytes() for layer in cache.layers)
    assert all(t["padding_bytes"] == 0 for t in real)
    need, slack = sum(t["kv_bytes"] for t in real), 0.1 * totals["kv_bytes"]
    assert abs(totals["kv_bytes"] - totals["padding_bytes"] - need) < slack
    if method in ("snapkv", "streaming"):
        assert totals["padding_bytes"] > slack
        assert f"{totals['padding_bytes']:,} bytes only fill up" in text


@torch.no_grad()
def test_how_it_looks():
    """No number with more than three decimals, the same in notebooks, escaped; a name for the compression."""
    model, batch = shared("llava"), batch_of("llava")
    with model.compressed(["visionzip", "snapkv"], [0.5, 0.3], window=4):
        name = repr(model.compression)
        assert name == f"LlavaForConditionalGeneration compressed by {model.compression.config.summary()}"
        assert "not called yet" in model.compression._repr_html_()
        model(**batch, use_cache=True)
        report = model.compression.report()
        text, page = str(report), report._repr_html_()
        assert model.compression._repr_html_() == page
    assert not re.search(r"\.\d{4}", text + page)
    assert "->" not in page and "-&gt;" in page
    assert page.count("<tr>") == len(report._table()) and name in text
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert cells == [x for line in report._table()[1:] for x in line]
