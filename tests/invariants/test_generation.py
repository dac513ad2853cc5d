"""Everything else that people do with generate and forward gives the same with and without each way of doing it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

import hf_compress
from tests import tiny
from tests.invariants.reference import (
    NAMES,
    VLMS,
    alone,
    bare,
    batch_of,
    close,
    compressed,
    fresh,
    greedy,
    logits_of,
    matrix,
    of_kind,
    options,
    shared,
    unchanged,
)
from tests.tiny import GREEDY, IMG, TOKEN_KEYS

PACKED = ("gear", "kivi", "mikv", "zipcache")


def stage(method):
    return hf_compress.methods()[method].stage


@matrix()
def test_sdpa_is_eager(method, name):
    batch, results = batch_of(name), []
    for attn in ("sdpa", "eager"):
        model = shared(name, attn)
        torch.manual_seed(1)  # of new modules: those of seed 0 put ia_red2 in fp32 1.1e-4 away from fp64, on any kernel
        with compressed(model, method):
            run = greedy(model, batch)
            results.append((logits_of(model, batch)[batch["attention_mask"].bool()], run.logits, run.tokens))
            last = model.compression.last
            results[-1] += ((last.visual_kept, last.layer_index, last.cache_tokens),)
    close(results[0][0], results[1][0])
    if method in PACKED:
        return  # keys that differ in their last bit may take another code
    close(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2]) and results[0][3] == results[1][3]


@matrix()
def test_bf16_keeps_as_many(method, name):
    model = fresh(name).to(torch.bfloat16)
    batch = tiny.inputs(name, model)
    single = shared(name)
    with compressed(single, method):
        greedy(single, batch_of(name))
        expected = single.compression.last
    with compressed(model, method):
        run, last = greedy(model, batch), model.compression.last
        with torch.no_grad():
            cache = model(**batch).past_key_values
    assert run.logits.isfinite().all()
    assert (last.layer_tokens, last.cache_tokens) == (expected.layer_tokens, expected.cache_tokens)
    assert [[len(k) for k in s] for s in last.visual_kept] == [[len(k) for k in s] for s in expected.visual_kept]
    if method in PACKED or stage(method) != "cache":
        return
    index = sum(t.numel() * t.element_size() for layer in cache.layers for t in layer.layout.tensors())
    if method in of_kind("even"):  # keys and values take half, indices what they took
        assert 2 * (sum(last.cache_bytes) - index) == sum(expected.cache_bytes) - index


@matrix(names=[name for name in NAMES if name not in tiny.HYBRIDS])  # transformers refuses those
def test_prompt_lookup_is_greedy(method, name):
    """Tokens checked several at once and taken back equal tokens one by one."""
    model = shared(name)
    prompt = [1, 5, IMG, 7, 8, 9, 7, 8, 9, 7, 8] if name in VLMS else [1, *[5, 6, 7] * 7]
    batch = tiny.batch(name, model, [prompt])
    longer = GREEDY | dict(max_new_tokens=12)
    for knobs in ({}, {"policy": "grow"}) if stage(method) == "cache" else ({},):
        with compressed(model, method, **knobs):
            expected = model.generate(**batch, **longer)
            if model.compression.context.idles:
                with pytest.raises(ValueError, match="generate without candidates"):
                    model.generate(**batch, **longer, prompt_lookup_num_tokens=3)
                continue
            installed = model.compression.context.cache_method
            holds = installed is not None and installed.policy == "hold" and method != "streaming"
            if holds or method in ("kivi", "gear"):
                with pytest.raises(ValueError, match="policy='grow'" if holds else "without candidates"):
                    model.generate(**batch, **longer, prompt_lookup_num_tokens=3)
                continue
            assert torch.equal(model.generate(**batch, **longer, prompt_lookup_num_tokens=3), expected)


@matrix()
def test_uncached_generate_is_cached_generate(method, name):
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        cached = greedy(model, batch)
        if stage(method) == "cache":
            with pytest.raises(ValueError, match="use_cache"):
                greedy(model, batch, use_cache=False)
            return
        uncached = greedy(model, batch, use_cache=False)
    close(uncached.logits, cached.logits)
    assert torch.equal(uncached.tokens, cached.tokens)


@matrix()
def test_small_ways_of_calling(method, name):
    """One new token, tensors instead of a dict, a cache of the user's own, repeated calls."""
    model, batch = shared(name), batch_of(name)
    length = batch["input_ids"].shape[1]
    with compressed(model, method):
        run = greedy(model, batch)
        assert torch.equal(run.out.sequences[:, :length], batch["input_ids"])
        assert torch.equal(model.generate(**batch, **GREEDY), run.out.sequences)
        one = model.generate(**batch, **(GREEDY | dict(max_new_tokens=1)))
        assert torch.equal(one, run.out.sequences[:, : length + 1])
        limit = {k: v for k, v in GREEDY.items() if k != "max_new_tokens"}
        assert torch.equal(model.generate(**batch, **limit, max_length=length + 5), run.out.sequences)
        mine = DynamicCache()
        own = greedy(model, batch, past_key_values=mine)
        assert torch.equal(own.logits, run.logits) and own.cache is mine
        with torch.no_grad():
            close(model(**batch).logits[:, -1], run.logits[:, 0])
            positional = model(batch["input_ids"], **{k: v for k, v in batch.items() if k != "input_ids"})
            close(positional.logits[:, -1], run.logits[:, 0])
            few = model(**batch, logits_to_keep=3).logits
            assert few.shape == bare(name, "sdpa")(**batch, logits_to_keep=3).logits.shape
            close(few[:, -3:], model(**batch).logits[:, -3:])
            as_tuple = model(**batch, return_dict=False)
            close(as_tuple[0][:, -1], run.logits[:, 0])


@matrix()
def test_streamer_sees_the_callers_prompt(method, name):
    model, sample = shared(name), alone(name, batch_of(name), 0)

    class Streamer:
        seen, ended = [], False

        def put(self, value):
            self.seen = self.seen + value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    with compressed(model, method):
        out = model.generate(**sample, **GREEDY, streamer=streamer)
    assert streamer.ended and streamer.seen == out[0].tolist()
    assert streamer.seen[: sample["input_ids"].shape[1]] == sample["input_ids"][0].tolist()


@matrix()
def test_attentions_and_hidden_states(method, name):
    """Readable in eager mode: attentions per layer, of the length that it really had; hidden states at the caller's, as
    logits are, a removed row repeating its last surviving predecessor."""
    model, batch = shared(name, "eager"), batch_of(name)
    with compressed(model, method):
        with torch.no_grad():
            out = model(**batch, output_attentions=True, output_hidden_states=True)
        last, acts = model.compression.last, model.compression.context.decoder_method
        widths = [max(last.attended.get(i, tokens)) for i, tokens in enumerate(last.layer_tokens)]
        alive = last.layer_index if acts is None or not acts.waits else last.layer_index[:1] * 4
        run = greedy(model, batch, output_attentions=True, output_hidden_states=True)
        plain = logits_of(model, batch)
    assert torch.equal(out.logits, plain)
    text = model.config.get_text_config()
    attends = [hasattr(layer, "self_attn") for layer in model.get_decoder().layers]
    assert [a.shape[1] for a in out.attentions] == [text.num_attention_heads] * sum(attends)
    assert len(out.hidden_states) == 5
    for attention, width in zip(out.attentions, [width for width, here in zip(widths, attends) if here]):
        assert attention.shape[-2:] == (width, width)
        close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    head = model.get_output_embeddings()(out.hidden_states[-1])
    assert torch.equal(head.argmax(-1), out.logits.argmax(-1))  # logits, but for the scale that some models give them
    for state, rows in zip(out.hidden_states, [alive[0], *alive]):
        assert state.shape[:2] == batch["input_ids"].shape
        for b, here in enumerate(rows):
            mine, gone = torch.tensor(here), sorted(set(range(here[0], len(state[b]))) - set(here))
            before = mine[torch.searchsorted(mine, torch.tensor(gone), right=True) - 1] if gone else mine[:0]
            assert torch.equal(state[b, gone], state[b, before])
    assert len(run.out.attentions) == len(run.out.hidden_states) == 5  # one per token


@pytest.mark.parametrize("side", ["left", "right"])
@matrix()
def test_hidden_states_of_a_padded_row_are_its_own(method, name, side):
    """Before and after every cut: what each sample has alone."""
    model, batch = shared(name), batch_of(name, side=side)
    valid = batch["attention_mask"].bool()
    with compressed(model, method), torch.no_grad():
        together = model(**batch, output_hidden_states=True).hidden_states
        for row in range(2):
            single = model(**alone(name, batch, row), output_hidden_states=True).hidden_states
            for mine, ours in zip(single, together):
                close(ours[row, valid[row]], mine[0])


@matrix()
def test_sampling_runs(method, name):
    model, batch = shared(name), batch_of(name)
    draw = dict(max_new_tokens=6, do_sample=True, temperature=1.5, top_p=0.9, suppress_tokens=GREEDY["suppress_tokens"])
    with compressed(model, method):
        torch.manual_seed(0)
        first = model.generate(**batch, **draw)
        torch.manual_seed(0)
        second = model.generate(**batch, **draw)
    assert torch.equal(first, second) and first.shape[1] == batch["input_ids"].shape[1] + 6


@matrix(names=[name for name in NAMES if name != "qwen2_5_omni_thinker"])  # without a mask it counts no images
def test_no_mask_is_a_mask_of_ones(method, name):
    """Gaps in the positions of the survivors are no packed sequences, with and without a cache."""
    model, batch = shared(name), batch_of(name, "equal")
    bare_batch = {k: v for k, v in batch.items() if k != "attention_mask"}
    with compressed(model, method):
        for use_cache in (True, False) if stage(method) != "cache" else (True,):
            with_mask = logits_of(model, batch, use_cache=use_cache)
            close(logits_of(model, bare_batch, use_cache=use_cache), with_mask)
        if stage(method) != "cache":
            close(logits_of(model, batch, use_cache=False), logits_of(model, batch))


@pytest.mark.parametrize(
    ("method", "name", "order"),
    [("snapkv", "llama", "compile first"), ("divprune", "llava", "compress first")],  # compiling takes long
)
def test_compiled_is_uncompiled(method, name, order):
    """Also where the compiled model ran before it was compressed, and after decompress()."""
    model, batch = fresh(name), batch_of(name)
    plain = logits_of(model, batch)
    torch._dynamo.reset()
    if order == "compile first":
        compiled = torch.compile(model, backend="eager")
        close(logits_of(compiled, batch), plain)
        model.compress(method, **options(method, model))
    else:
        model.compress(method, **options(method, model))
        compiled = torch.compile(model, backend="eager")
    expected = logits_of(model, batch)
    close(logits_of(compiled, batch), expected)
    model.decompress()
    close(logits_of(compiled, batch), plain)
    torch._dynamo.reset()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if torch.is_tensor(t):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@matrix()
def test_scoring_allocates_no_square(method, name):
    """A prompt of 700 tokens: nothing larger than what the bare model makes, or one block of attention rows."""
    if method == "kvzip":
        return  # its passes are forwards of their own, of `chunk` rows, each with the mask of the model
    model = shared(name)
    words = torch.randint(3, 80, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = tiny.batch(name, model, [[1, IMG, *words] if name in VLMS else words])
    length = batch["input_ids"].shape[1]
    with Largest() as plain:
        logits_of(model, batch)
    with compressed(model, method), Largest() as here:
        logits_of(model, batch)
    block = 256 * 4 * length  # rows of a block x heads x keys
    limit = max(plain.numel, block if "columns" in hf_compress.methods()[method].needs else 0)
    if method in of_kind("passing"):
        limit = length**2  # what no text may see is a mask of bools
    assert here.numel <= max(limit, length * 100)
    assert here.numel < max(4 * length**2, plain.numel + 1)  # eager models make squares of their own


# -- refusals -------------------------------------------------------------------------------------------------------
REFUSED = [
    (dict(prefill_chunk_size=16), ("decoder", "cache"), "prefill_chunk_size"),
    (dict(cache_implementation="static"), ("decoder", "cache"), "cache_implementation='static'"),
    (dict(cache_implementation="offloaded"), ("vision", "decoder", "cache"), "cache_implementation='offloaded'"),
    (dict(cache_implementation="quantized"), ("vision", "decoder", "cache"), "cache_implementation='quantized'"),
]


@pytest.mark.parametrize(("arguments", "stages", "message"), REFUSED, ids=[next(iter(r[0].values())) for r in REFUSED])
@matrix()
def test_refused_arguments(method, name, arguments, stages, message):
    """The message names the argument; the next call works."""
    if stage(method) not in stages:
        return
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        expected = greedy(model, batch)
        with unchanged(model), pytest.raises(ValueError, match=message):
            model.generate(**batch, **GREEDY, **arguments)
        config = model.generation_config
        for key, value in arguments.items():
            setattr(config, key, value)
        try:
            with pytest.raises(ValueError, match=message):
                model.generate(**batch, **GREEDY)
        finally:
            for key in arguments:
                setattr(config, key, None)
        assert torch.equal(greedy(model, batch).logits, expected.logits)


@matrix()
def test_a_static_cache_object_is_refused(method, name):
    from transformers import StaticCache

    model, batch = shared(name), batch_of(name)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    with compressed(model, method), pytest.raises(ValueError, match="StaticCache"):
        logits_of(model, batch, past_key_values=cache)


@matrix(names=VLMS)
def test_embeddings_without_ids_are_refused(method, name):
    """Placeholders are found by their ids; a cache method needs none."""
    model, batch = shared(name), batch_of(name)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    with compressed(model, method):
        if stage(method) == "cache":
            logits_of(model, dict(inputs_embeds=embeds, attention_mask=batch["attention_mask"]))
            return
        with pytest.raises(ValueError, match="inputs_embeds"):
            logits_of(model, dict(inputs_embeds=embeds, attention_mask=batch["attention_mask"]))
        with pytest.raises(ValueError, match="inputs_embeds"):
            model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], max_new_tokens=2)


@matrix(names=VLMS)
def test_features_that_do_not_fit_are_refused(method, name):
    """One placeholder too few, and placeholders without pixels; the next call works."""
    model, batch = shared(name), batch_of(name)
    fewer = dict(batch, input_ids=batch["input_ids"].clone())
    fewer["input_ids"][0, (batch["input_ids"][0] == IMG).nonzero()[0]] = 7
    blind = {k: v for k, v in batch.items() if k in TOKEN_KEYS}
    with compressed(model, method):
        expected = logits_of(model, batch)
        with pytest.raises(Exception, match=r"(?i)match"):
            logits_of(model, fewer)
        if stage(method) in ("vision", "decoder"):
            with pytest.raises(ValueError, match="placeholders"):
                logits_of(model, blind)
        assert torch.equal(logits_of(model, batch), expected)


@pytest.mark.parametrize("name", VLMS)
def test_the_language_model_alone_is_refused(name):
    """get_decoder() called directly would be compressed without knowing what is visual."""
    model = shared(name)
    with compressed(model, "uniform"), pytest.raises(RuntimeError, match="compressed model itself"):
        model.get_decoder()(input_ids=torch.tensor([[1, 5, 6]]))
    assert bare(name).get_decoder()(input_ids=torch.tensor([[1, 5, 6]])).last_hidden_state.shape[1] == 3
