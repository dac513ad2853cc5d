"""What a release of transformers may rename or leave out is refused by compress(), or by the first prompt."""

import functools
import inspect

import pytest
import torch
import transformers as T

from hf_compress.patches import versions
from tests.invariants.reference import VLMS, batch_of, compressed, fresh, greedy, logits_of, longer, matrix, shared
from tests.tiny import GREEDY, TOKEN_KEYS

CASES = [("llama", "snapkv"), ("llama", "kvzip"), ("llama", "kivi"), ("llava", "uniform"), ("llava", "fastv")]


def with_forward(module, forward):
    """Give one module a class of its own, as another release would have it."""
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def parts(model):
    """Modules whose signatures matter, from the outside in."""
    decoder = model.get_decoder()
    return {"model": model, "decoder": decoder, "layer": decoder.layers[0], "attention": decoder.layers[0].self_attn}


@pytest.mark.parametrize("part", ["model", "decoder", "layer", "attention"])
def test_an_argument_of_another_name_is_refused(part):
    """Whoever renames the cache again is named, with the release that is installed and those that work."""
    model = fresh("llama")
    module = parts(model)[part]
    inner = type(module).forward
    name = versions.cache_name(module)

    @functools.wraps(inner)
    def forward(self, *args, kv_state=None, **kwargs):
        return inner(self, *args, **{name: kv_state}, **kwargs)

    found = inspect.signature(inner)
    renamed = [p.replace(name="kv_state") if p.name == name else p for p in found.parameters.values()]
    forward.__signature__ = found.replace(parameters=renamed)
    with_forward(module, forward)
    with pytest.raises(RuntimeError, match=rf"(?s){type(module).__name__}.*{T.__version__}.*{versions.TESTED[0]}"):
        compressed(model, "snapkv").__enter__()
    assert model.compression is None


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_cache_that_is_passed_by(name, method):
    """The decoder makes a cache of its own, as 5.24 did when it was handed one by its former name."""
    model = fresh(name)
    decoder = model.get_decoder()
    inner, argument = type(decoder).forward, versions.cache_name(decoder)

    @functools.wraps(inner)
    def forward(self, *args, **kwargs):
        return inner(self, *args, **{**kwargs, argument: None})

    with_forward(decoder, forward)
    with compressed(model, method):
        for _ in range(2):  # not only once
            with pytest.raises(RuntimeError, match=r"did not take hold of .*KV cache"):
                logits_of(model, batch_of(name), use_cache=True)


@pytest.mark.parametrize("method", ["snapkv", "kivi"])
def test_layers_that_never_evict(method):
    """A layer calls its attention without the hooks: nothing is evicted or packed."""
    model = fresh("llama")
    layer = model.model.layers[1]
    outer = type(layer).forward

    @functools.wraps(outer)
    def call(self, *args, **kwargs):
        kept = self.self_attn._forward_hooks.copy()
        self.self_attn._forward_hooks.clear()
        try:
            return outer(self, *args, **kwargs)
        finally:
            self.self_attn._forward_hooks.update(kept)

    with_forward(layer, call)
    with compressed(model, method), pytest.raises(RuntimeError, match=r"never (evicted|packed)"):
        logits_of(model, batch_of("llama"), use_cache=True)


def test_rows_that_are_not_cut():
    """A layer that does not let its hooks act leaves more visual rows than planned."""
    model = fresh("llava")
    layer = model.get_decoder().layers[1]

    def call(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)  # without hooks

    kind = type(layer)
    layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    with compressed(model, "fastv"), pytest.raises(RuntimeError, match="did not take hold"):
        logits_of(model, batch_of("llava"), use_cache=False)


@matrix(names=[*VLMS, "llama"])
def test_either_name_of_the_cache(method, name):
    """The second turn continues a cache that is handed over by the name of any release, to forward and generate."""
    model, batch, runs = shared(name), batch_of(name), []
    with compressed(model, method):
        for argument in versions.CACHE:
            first = greedy(model, batch)
            again = longer(name, batch, torch.cat([first.tokens, torch.full((2, 3), 7)], 1))
            again = {key: value for key, value in again.items() if key in TOKEN_KEYS}
            runs.append(greedy(model, again, **{argument: first.cache}).logits)
    assert torch.equal(*runs)


def test_both_names_at_once():
    """One argument given twice."""
    model, batch = shared("llama"), batch_of("llama")
    with compressed(model, "snapkv"):
        cache = versions.cache_of(model(**batch))
        ids = torch.full((2, 1), 7)
        with pytest.raises(ValueError, match="are one argument"):
            model(input_ids=ids, cache=cache, past_key_values=T.DynamicCache())
        model.generate(**batch, **GREEDY)


def test_training_without_gradients_and_with_checkpointing():
    """Since 5.24 a layer is checkpointed only while gradients are recorded; the cache follows what is installed."""
    model, batch = fresh("llama"), batch_of("llama")
    model.gradient_checkpointing_enable()
    model.train()
    with compressed(model, "snapkv"), torch.no_grad():
        out = model(**batch, use_cache=True)
        bare = fresh("llama").train()
    bare.gradient_checkpointing_enable()
    with torch.no_grad():
        expected = bare(**batch, use_cache=True)
    assert (versions.cache_of(out) is None) == (versions.cache_of(expected) is None)
