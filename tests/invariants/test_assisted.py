"""Assisted decoding gives what decoding token by token gives, or is refused before anything runs."""

import copy

import pytest
import torch
from transformers import DynamicCache

import hf_compress
from hf_compress.methods.holding import Holding
from hf_compress.patches.versions import cache_name, cache_of
from tests import tiny
from tests.invariants.reference import batch_of, close, fresh, greedy, options, shared
from tests.tiny import GREEDY, IMG

LOOKUP = dict(prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
CACHE = [name for name, spec in hf_compress.methods().items() if spec.stage == "cache"]
EXACT = {"streaming"}  # of those that hold their budget: entries go by their order, whatever comes together
PACKING = {"kivi", "gear"}  # pack what is generated too


def policies():
    """Cache methods with each policy that they take."""
    return [(name, policy) for name in CACHE for policy in hf_compress.methods()[name].cls().policies]


def knobs_of(method):
    knobs = dict(options(method))
    knobs.pop("policy", None)
    return knobs


def loop(model):
    """A prompt that repeats itself, so that lookup finds candidates."""
    return tiny.batch("llama", model, [[1, *[5, 6, 7] * 7]])


@pytest.mark.parametrize("method, policy", policies())
def test_exact_or_refused(method, policy):
    """Exact over many tokens, where everything that changes while decoding has had time to."""
    model = shared("llama")
    run = GREEDY | dict(max_new_tokens=40, output_logits=True, return_dict_in_generate=True)
    with model.compressed(method, **knobs_of(method), policy=policy):
        if (policy == "hold" and method not in EXACT) or method in PACKING:
            with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens: .*than one by one"):
                model.generate(**loop(model), **run, **LOOKUP)
            assert model.compression.last is None  # nothing has run
            return
        expected = model.generate(**loop(model), **run)
        got = model.generate(**loop(model), **run, **LOOKUP)
    assert torch.equal(got.sequences, expected.sequences)
    close(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("method", sorted(PACKING | {"keydiff", "lacache"}))
def test_what_is_refused_would_be_wrong(method, monkeypatch):
    """The refusals are no caution: fed together, tokens of these methods have other logits than one by one."""
    model = shared("llama")
    more = torch.randint(3, 80, (1, 12), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def logits(rows):
        cache = DynamicCache()
        model(**loop(model), past_key_values=cache)
        return torch.cat([model(part, past_key_values=cache).logits for part in more.split(rows, 1)], 1)

    policy = "grow" if method in PACKING else "hold"
    with model.compressed(method, **(knobs_of(method) | ({} if method in PACKING else dict(ratio=0.7))), policy=policy):
        assert model.compression.context.policy.stepwise
        assert (logits(1) - logits(6)).abs().max() > 0.01
    with model.compressed("streaming", ratio=0.7):
        close(logits(1), logits(6))


def test_stores_and_places_are_seen():
    """What a method is decides, not its name: a store of an evicting method, places in the cache."""
    model, run = shared("llama"), GREEDY | LOOKUP
    for method, knobs in (("knorm", dict(store="kivi4", ratio=0.8)), ("streaming", dict(rotation="cache", ratio=0.5))):
        with model.compressed(method, **knobs), pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
            model.generate(**loop(model), **run)
    assert Holding().stepwise
    for method in ("keydiff", "h2o"):  # ratio 0 is the bare model, which takes candidates
        expected = model.generate(**loop(model), **run)
        with model.compressed(method, ratio=0, policy="hold"):
            assert torch.equal(model.generate(**loop(model), **run), expected)


@pytest.mark.parametrize("method", ["streaming", "knorm", "snapkv"])
def test_attentions_and_hidden_states(method):
    """Ratio 0: those of the bare model. Else hidden states are those of decoding token by token."""
    model = shared("llama", "eager")
    extra = dict(output_attentions=True, output_hidden_states=True, return_dict_in_generate=True)
    run = GREEDY | dict(max_new_tokens=8) | extra
    wanted = model.generate(**loop(model), **run, **LOOKUP)
    with model.compressed(method, **(knobs_of(method) | dict(ratio=0))):
        got = model.generate(**loop(model), **run, **LOOKUP)
    for one, other in zip((*wanted.attentions, *wanted.hidden_states), (*got.attentions, *got.hidden_states)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with model.compressed(method, **knobs_of(method)):
        expected = model.generate(**loop(model), **run)
        got = model.generate(**loop(model), **run, **LOOKUP)
    assert [a[0].shape[2] for a in got.attentions] == [a[0].shape[2] for a in expected.attentions]
    for one, other in zip(expected.hidden_states, got.hidden_states, strict=True):
        for a, b in zip(one, other, strict=True):
            close(a[:, -1], b[:, -1])


@pytest.mark.parametrize("seed", [0, 7], ids=["accepted", "rejected"])
@pytest.mark.parametrize("who", ["main", "draft", "both"])
def test_assistants(who, seed):
    """A compressed model, a compressed assistant, or both: candidates all accepted or all rejected."""
    main, draft = fresh("llama"), fresh("llama")
    if seed:
        torch.manual_seed(seed)
        for p in draft.parameters():
            p.data = torch.randn_like(p) * 0.1
    run = GREEDY | dict(max_new_tokens=12)
    for method in ("streaming", "knorm", "snapkv", "xkv"):
        knobs = knobs_of(method) | dict(policy="grow")
        if who != "draft":
            main.compress(method, **knobs)
        if who != "main":
            draft.compress(method, **knobs)
        expected = main.generate(**loop(main), **run)
        assert torch.equal(main.generate(**loop(main), **run, assistant_model=draft), expected)
        for model in (main, draft):
            if getattr(model, "compression", None) is not None:
                model.decompress()


@pytest.mark.parametrize("method, remedy", [("streaming", "policy='grow'"), ("kivi", "leave the assistant bare")])
def test_assistants_that_cannot_go_back(method, remedy):
    main, draft = fresh("llama"), fresh("llama")
    draft.compress(method, **knobs_of(method))
    with pytest.raises(ValueError, match=f"assistant_model: .*{remedy}"):
        main.generate(**loop(main), **GREEDY, assistant_model=draft)


@pytest.mark.parametrize("method", ["uniform", "fastervlm", "random", "fastv", "snapkv"])
def test_a_vision_model_drafts_for_itself(method):
    """Transformers gives a draft no features; the answer is that of decoding token by token all the same."""
    model = shared("llava")
    prompt = tiny.batch("llava", model, [[1, 5, IMG, 7, 8, 9, 7, 8, 9, 7, 8]])
    run = GREEDY | dict(max_new_tokens=8)
    with model.compressed(method, **knobs_of(method)):
        expected = model.generate(**prompt, **run)
        assert torch.equal(model.generate(**prompt, **run, assistant_model=model), expected)
        assert torch.equal(model.generate(**prompt, **run, **LOOKUP), expected)
        assert model.compression.last.prompt_tokens == [prompt["input_ids"].shape[1]]


def test_early_exit_is_refused_where_layers_belong_together():
    model = shared("llama")
    with model.compressed("knorm", ratio=0.5), pytest.raises(ValueError, match="assistant_early_exit"):
        model.generate(**loop(model), **GREEDY, assistant_early_exit=2)


# -- taking tokens back by oneself -------------------------------------------------------------------------------------
def test_crop_of_what_was_fed_since():
    """Tokens fed after the prompt can be taken back; the cache goes on as if they had not been there."""
    model, prompt = shared("llama"), loop(shared("llama"))
    more = torch.tensor([[9, 10, 11]])
    with model.compressed("knorm", ratio=0.5), torch.no_grad():
        caches = [model(**prompt).past_key_values for _ in range(2)]
        model(more, past_key_values=caches[0])
        caches[0].crop(-3)
        one, other = (model(more.flip(1), past_key_values=cache).logits for cache in caches)
        close(one, other)
        caches[0].crop(-30)  # as in a bare cache, more than there is leaves it empty
        assert caches[0].get_seq_length() == 0
        close(model(**prompt, past_key_values=caches[0]).logits, model(**prompt).logits)


def state_of(cache):
    return [(layer.get_seq_length(), copy.copy(layer.keys), copy.copy(layer.values)) for layer in cache.layers]


@pytest.mark.parametrize("name, method, tokens", [
    ("llama", "knorm", 1),  # the prompt was chosen from
    ("llama", "kivi", 21),  # and packed
    ("llava", "uniform", 12),  # an image was cut
    ("llava", "fastv", 12),  # in some of the layers
    ("gemma3", "knorm", 2),  # the first layers slide
])  # fmt: skip
def test_crop_of_what_cannot_come_back(name, method, tokens):
    """Refused in words about this cache, and all layers stay as they were."""
    model = shared(name)
    prompt = loop(model) if name == "llama" else tiny.batch(name, model, [[1, 5, IMG, 7, 8, *range(11, 16)]])
    with model.compressed(method, **knobs_of(method)), torch.no_grad():
        cache = model(**prompt).past_key_values
        before = state_of(cache)
        with pytest.raises(ValueError, match=rf"crop\(-{tokens}\): the newest \d+ tokens .* start a new cache"):
            cache.crop(-tokens)
        with pytest.raises(ValueError, match="negative"):
            cache.crop(2)
    for (n, *one), (m, *other) in zip(before, state_of(cache), strict=True):
        assert n == m and all(map(torch.equal, one, other))


def test_crop_beyond_a_window():
    """Slots that left the window are gone; a bare cache refuses that too."""
    model = shared("gemma3")
    with model.compressed("uniform", ratio=0.5):
        run = greedy(model, batch_of("gemma3"), max_new_tokens=6)
        assert any(layer.dropped for layer in run.cache.layers)
        with pytest.raises(ValueError, match="window"):
            run.cache.crop(-4)


@pytest.mark.parametrize("assisted", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "itself"}])
def test_candidates_behind_a_cache_that_holds_tokens(assisted):
    """transformers feeds the whole conversation once more then, compressed or not: refused, but at ratio 0."""
    model = tiny.build("llama")
    ids = torch.randint(3, 80, (1, 20))
    assisted = {key: model if value == "itself" else value for key, value in assisted.items()}
    with model.compressed("knorm", ratio=0.5):
        first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, ids[:, :4]], 1)
        with pytest.raises(ValueError, match="behind a cache that holds tokens"):
            model.generate(longer, **GREEDY, **{cache_name(model): cache_of(first)}, **assisted)
        model.generate(longer, **GREEDY, **{cache_name(model): cache_of(first)})
