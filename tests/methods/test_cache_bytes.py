"""Bytes of low-bit caches over what the ratio promises, everything included: at most 1.05 from 1024 tokens on."""

import functools
import gc
from fractions import Fraction
from types import BuiltinFunctionType, FunctionType, ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_compress.engine.entries import StoredView
from hf_compress.methods.cache.gear import Gear
from hf_compress.methods.cache.keydiff import KeyDiff
from hf_compress.methods.cache.kivi import Kivi
from hf_compress.methods.cache.mikv import MiKV
from hf_compress.methods.cache.snapkv import SnapKV
from hf_compress.methods.cache.zipcache import ZipCache
from hf_compress.stores.kivi import KiviStore
from tests.invariants.reference import compressed, of_kind
from tests.methods.test_cache_low_bits import Steps

LENGTHS = [1024, 2048, 4096]
HEADS, SIZE = 2, 128


def run(method, length, ratio, size=SIZE):
    return Steps(method, [length], ratio, heads=HEADS, group=1, d=size, dtype=torch.bfloat16)


def share(held, length, ratio, size=SIZE):
    """Bytes over promised bytes."""
    return held.nbytes() / (float(1 - Fraction(ratio)) * 2 * 2 * HEADS * size * length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("store", "ratio"),
    [("kivi8", "0.6"), ("kivi4", "0.7"), ("kivi4", "0.9"), ("kivi2", "0.85"), ("kivi1", "0.9"), ("kivi1", "0.95")],
)
def test_evicted_and_packed(store, ratio, length):
    """Never more than promised, and few entries less than that pays for; the residual and indices are in it."""
    for size in (64, 128):
        for method in (SnapKV(store=store), KeyDiff(store=store)):
            held = run(method, length, ratio, size).held
            assert 0.985 < share(held, length, ratio, size) <= 1


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("ratio", ["0.8", "0.95"])
def test_uneven_heads_and_packed(ratio, length):
    held = run(SnapKV(store="kivi4", heads="adaptive"), length, ratio).held
    assert 0.9 < share(held, length, ratio) <= 1.05


@pytest.mark.parametrize("length", [8, 40, 100, 300])
def test_short_prompts_keep_what_the_bytes_allow(length):
    """Unpacked, where that is less than the residual."""
    held = run(SnapKV(store="kivi4", window=4), length, "0.75").held
    unpacked = max(1, length * 512 // 4 // (512 + 2))  # bytes of an entry, and of its index
    assert len(held.layout) == unpacked if length < 128 else len(held.layout) > unpacked
    assert share(held, length, "0.75") <= 1


def test_entries_by_hand():
    """100 entries of a head of 32 channels, 128 bytes each: at half the bytes 32 as they are, and of the others 16 + 16
    bytes of codes and 4 for the value's scale, besides 128 for each of two groups of keys."""
    store = KiviStore(4, 4)
    assert store.entries(100, Fraction(1, 2), (32, 32)) == 32 + (100 * 64 - 32 * 128 - 2 * 128) // (16 + 16 + 4)
    assert store.entries(100, Fraction(1, 4), (32, 32)) == 25 and store.entries(0, Fraction(1, 4), (32, 32)) == 0
    assert store.entries(100, Fraction(1, 1000), (32, 32)) == 1 and store.entries(100, Fraction(1), (32, 32)) == 100
    assert store.entries(100, Fraction(1, 4), (32, 32), index=4) == 100 * 32 // (128 + 4)
    # 40 entries outside: they are the newest ones
    assert store.entries(100, Fraction(1, 4), (32, 32), outside=40) == (100 * 32 - 3 * 128) // 36


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ratio", ["0.4375", "0.5", "0.65", "0.6875", "0.75", "0.8125", "0.82", "0.86", "0.875"])
def test_kivi(ratio, length):
    """Over eight layers, some of which may take the wider of two widths."""
    method, total = Kivi(), 0.0
    method.check(8, Fraction(ratio))
    base = run(Kivi(), length, None)
    for depth in range(8):
        held = base.held
        held.body, held.keys, held.values = None, base.k, base.v
        method.packing().settle([held], [StoredView(held, depth, 8, torch.tensor([length]), place=(depth, 8))])
        total += share(held, length, ratio) / 8
    assert 0.8 < total <= 1.05


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("method", "ratio"),
    [
        (ZipCache, "0.78"),
        (ZipCache, "0.85"),
        (lambda: ZipCache(high=8, low=4), "0.6"),
        (MiKV, "0.75"),
        (MiKV, "0.84"),
        (lambda: MiKV(high=8), "0.8"),
        (Gear, "0.6"),
        (Gear, "0.7"),
        (Gear, "0.8"),
        (lambda: Gear(backbone="kcvt"), "0.8"),
    ],
)
def test_mixed_and_corrected(method, ratio, length):
    assert 0.8 < share(run(method(), length, ratio).held, length, ratio) <= 1.05


# -- what a cache keeps alive ------------------------------------------------------------------------------------------
PROMPT = 509


@functools.cache
def language_model():
    sizes = dict(hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    config = LlamaConfig(vocab_size=100, num_key_value_heads=2, eos_token_id=None, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).eval()


def reachable(cache, model):
    """Bytes of every storage that the cache keeps alive, the weights of the model excepted."""
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen, todo, found = set(), [cache], {}
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, FunctionType, BuiltinFunctionType)):
            continue
        seen.add(id(thing))
        todo += gc.get_referents(thing)
        if torch.is_tensor(thing):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(n for at, n in found.items() if at not in weights)


@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
@pytest.mark.parametrize("method", of_kind("cache"))
def test_nothing_of_the_prompt_stays_alive(method, padded):
    """Neither its masks nor its book: what a cache keeps alive is what it reports and its running scores.

    Of rows that are padded the places stay known, 7 bytes each for all layers together.
    """
    model = language_model()
    ids = torch.randint(3, 100, (1 + padded, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, :200] = 0
    with compressed(model, method):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    layers = out.past_key_values.layers
    counted = sum(layer.nbytes() for layer in layers)
    running = [t for layer in layers for t in layer.side.values()]
    running += [layer.quota.ages for layer in layers if layer.quota is not None and layer.quota.ages is not None]
    counted += sum(t.untyped_storage().nbytes() for t in running)
    places = padded * 7 * len(ids) * (PROMPT + 2)
    assert reachable(out.past_key_values, model) <= 1.005 * counted + places
