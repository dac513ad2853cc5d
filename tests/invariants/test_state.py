"""The state that a call finds is the state that it leaves: calls inside calls, failures, interrupts, threads."""

import inspect
import threading

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList, TextStreamer

from tests import tiny
from tests.invariants.reference import batch_of, close, compressed, fresh, greedy, logits_of, options, shared, unchanged
from tests.tiny import GREEDY

METHODS = ["uniform", "fastervlm", "fastv", "snapkv"]


def others(model):
    """Calls of the same model that a processor or a criterion might make."""
    batch, other = batch_of("llava"), tiny.mixed("llava", model)
    longer = {k: v for k, v in batch.items() if k != "pixel_values"} | dict(pixel_values=batch["pixel_values"].flip(0))
    cache = dict(use_cache=model.compression is None or model.compression.context.policy is not None)
    return {
        "generate": lambda: model.generate(**other, **GREEDY, **cache),
        "forward": lambda: model(**other),
        "a longer prompt": lambda: model(**tiny.batch("llava", model, [[1, 5, 90, 7, 90, 8, *range(9, 30)]])),
        "other images": lambda: model(**longer),
        "text": lambda: model(input_ids=torch.tensor([[5, 6, 7]])),
        "features": lambda: model.get_image_features(**tiny.encoder_inputs(other)),
        "a failure": lambda: refused(model, {**other, "pixel_values": other["pixel_values"].long()}),
    }


@pytest.mark.parametrize(
    "what", ["generate", "forward", "a longer prompt", "other images", "text", "features", "a failure"]
)
@pytest.mark.parametrize("method", METHODS)
def test_calls_inside_generate(method, what):
    """Neither the outer call nor the inner one notices the other, with and without a cache."""
    model, batch = shared("llava"), batch_of("llava")
    with compressed(model, method):
        call = others(model)[what]
        alone, results = call(), []

        def ask(ids, scores, **_):
            results.append(call())
            return torch.zeros(len(ids), dtype=torch.bool)

        for cache in (True, False) if method != "snapkv" else (True,):
            expected = greedy(model, batch, use_cache=cache)
            got = greedy(model, batch, use_cache=cache, stopping_criteria=[ask])
            assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.logits, expected.logits)
        assert len(results) >= 5
        for result in results:
            for one, other in zip(tensors(result), tensors(alone), strict=True):
                assert torch.equal(one, other)


def refused(model, batch):
    with pytest.raises(ValueError, match="pixel_values"):
        model(**batch)


def tensors(result):
    if torch.is_tensor(result):
        return [result]
    return [t for t in (getattr(result, "logits", None), getattr(result, "pooler_output", None)) if torch.is_tensor(t)]


@pytest.mark.parametrize("method", METHODS)
def test_guidance(method):
    """Classifier-free guidance calls the model for a prompt of its own."""
    model, batch = shared("llava"), batch_of("llava")
    run = dict(guidance_scale=1.5)
    with compressed(model, method):
        cached = greedy(model, batch, **run)
        assert not torch.equal(cached.out.sequences, 0 * cached.out.sequences)
        if method != "snapkv":  # needs its cache
            uncached = greedy(model, batch, **run, use_cache=False)
            assert torch.equal(cached.tokens, uncached.tokens)
            close(cached.logits, uncached.logits)


@pytest.mark.parametrize("method", METHODS)
def test_a_call_inside_a_forward(method):
    """A hook of the user's own that asks the same model something else."""
    model, batch = shared("llava"), batch_of("llava")
    with compressed(model, method):
        expected, answers = logits_of(model, batch), []
        other = tiny.mixed("llava", model)
        alone = logits_of(model, other)

        def ask(module, args):
            if not answers:
                answers.append(None)  # the call below comes by here too
                answers[0] = logits_of(model, other)

        handle = model.get_decoder().layers[2].register_forward_pre_hook(ask)
        try:
            got = logits_of(model, batch)
        finally:
            handle.remove()
    assert torch.equal(got, expected) and torch.equal(answers[0], alone)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("where", ["layer", "tower", "head"])
@pytest.mark.parametrize("method", ["uniform", "tome", "fastv", "snapkv"])
def test_interrupts(method, where, error):
    """Whatever ends a call, wherever: nothing is left, the report is that of the last prompt that was done."""
    model, batch = shared("llava"), batch_of("llava")
    tower = model.model.vision_tower.base_model.encoder.layers[1]
    module = {"layer": model.get_decoder().layers[2], "tower": tower, "head": model.lm_head}[where]

    def stop(*_):
        raise error

    with compressed(model, method):
        for done in (False, True):
            expected = greedy(model, batch) if done else None
            last = model.compression.last
            handle = module.register_forward_pre_hook(stop)
            try:
                for call in (logits_of, greedy):
                    with pytest.raises(error):
                        call(model, tiny.mixed("llava", model))
            finally:
                handle.remove()
            assert not any(vars(model.compression.context.state).values())
            assert model.compression.last is last and (last is not None) == done
            assert str(model.compression.report())
        assert torch.equal(greedy(model, batch).logits, expected.logits)


def test_an_interrupt_inside_features():
    """`get_image_features` called by oneself leaves nothing either."""
    model, batch = shared("llava"), batch_of("llava")

    def stop(*_):
        raise KeyboardInterrupt

    with compressed(model, "tome"):
        expected = model.get_image_features(**tiny.encoder_inputs(batch)).pooler_output
        model.compression.context.state.encoded = {}
        handle = model.model.vision_tower.base_model.encoder.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model.get_image_features(**tiny.encoder_inputs(batch))
        handle.remove()
        state = model.compression.context.state
        assert (state.call, state.reduction, state.encoded) == (None, None, {})
        again = model.get_image_features(**tiny.encoder_inputs(batch)).pooler_output
    assert all(map(torch.equal, again, expected))


def test_features_asked_for_once_and_used_twice():
    """Features belong to the call that made them: two generate() and two forwards may read those of one call."""
    model, batch = shared("llava"), batch_of("llava")
    with compressed(model, "fastervlm"):
        expected = model.generate(**batch, **GREEDY)
        rest = {k: v for k, v in batch.items() if k != "pixel_values"}
        for call in (lambda **kw: model.generate(**kw, **GREEDY), lambda **kw: model(**kw).logits):
            with torch.no_grad():
                given = dict(image=model.get_image_features(**tiny.encoder_inputs(batch)))
                first, second = (call(**rest, mm_encoder_outputs=dict(given)) for _ in range(2))
            assert torch.equal(first, second)
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
        logits_of(model, batch)
        assert not model.compression.context.state.encoded


def test_threads():
    """A thread that fails, and one that asks during somebody else's generate(), share nothing."""
    model, batch = shared("llava"), batch_of("llava")
    other, answers = tiny.mixed("llava", model), []

    def ask(ids, scores, **_):
        thread = threading.Thread(target=lambda: answers.append(model.generate(**other, **GREEDY)))
        thread.start()
        thread.join()
        return torch.zeros(len(ids), dtype=torch.bool)

    with compressed(model, "fastv"):
        expected, alone = greedy(model, batch, use_cache=False), model.generate(**other, **GREEDY)
        got = greedy(model, batch, use_cache=False, stopping_criteria=[ask])
    assert torch.equal(got.logits, expected.logits)
    assert len(answers) == 5 and all(torch.equal(answer, alone) for answer in answers)


# -- the attributes that stand before methods of the model -------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_forward_by_name(method):
    """`model.forward(...)` is `model(...)`; its signature is that of the class; wrappers of others survive."""
    model, batch = fresh("llava"), batch_of("llava")
    signature = inspect.signature(model.forward)
    bare = logits_of(model, batch)
    with unchanged(model), compressed(model, method):
        assert inspect.signature(model.forward) == signature
        with torch.no_grad():
            assert torch.equal(model.forward(**batch).logits, logits_of(model, batch))
            by_place = model.forward(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
            assert torch.equal(by_place.logits, logits_of(model, batch))
    with compressed(model, method):
        expected = logits_of(model, batch)
        inner = model.forward
        model.forward = wrapper = lambda *args, **kwargs: inner(*args, **kwargs)  # as accelerate does
        assert torch.equal(logits_of(model, batch), expected)
    assert model.forward is wrapper and torch.equal(logits_of(model, batch), bare)
    with compressed(model, method):
        assert torch.equal(logits_of(model, batch), expected)
    assert model.forward is wrapper and torch.equal(logits_of(model, batch), bare)


# -- static caches -----------------------------------------------------------------------------------------------------
def test_a_static_cache_shows_whole_prompts():
    """Processors, criteria, prefix functions and streamers see the ids that they see with a dynamic cache."""
    model, batch = shared("llava"), batch_of("llava")

    class Stream(TextStreamer):
        def __init__(self):
            self.shown = []

        def put(self, value):
            self.shown.append(value.tolist())

        def end(self):
            self.shown.append("end")

    def run(**kwargs):
        seen, row = [], tiny.single(batch, 0, "llava")
        note = lambda ids, scores, **_: (seen.append(("p", ids.tolist())), scores)[1]
        stop = lambda ids, scores, **_: (seen.append(("s", ids.tolist())), torch.zeros(len(ids), dtype=torch.bool))[1]
        allow = lambda b, ids: (seen.append((b, ids.tolist())), list(range(3, 80)))[1]
        out = model.generate(
            **batch,
            **GREEDY,
            logits_processor=LogitsProcessorList([note]),
            stopping_criteria=StoppingCriteriaList([stop]),
            prefix_allowed_tokens_fn=allow,
            **kwargs,
        )
        stream = Stream()
        model.generate(**row, **GREEDY, streamer=stream, **kwargs)
        return out, seen, stream.shown

    for method in ("uniform", "fastervlm"):
        with compressed(model, method):
            (out, seen, stream), (want, wanted, streamed) = run(cache_implementation="static"), run()
        assert torch.equal(out, want) and sorted(map(str, seen)) == sorted(map(str, wanted)) and stream == streamed


def test_lengths_with_a_static_cache():
    """max_length and min_length count the caller's prompt, wherever they are said."""
    model, batch = shared("llava"), batch_of("llava")
    length, ids = batch["input_ids"].shape[1], GREEDY["suppress_tokens"]
    with compressed(model, "uniform"):
        eos = int(model.generate(**batch, **GREEDY)[0, length])  # the first token that it would say
        for limits in (
            dict(max_length=length + 7),
            dict(max_length=length + 7, min_length=length + 4, eos_token_id=eos),
        ):
            want = model.generate(**batch, do_sample=False, suppress_tokens=ids, **limits)
            for said in (limits, dict(generation_config=type(model.generation_config)(**limits))):
                got = model.generate(
                    **batch, do_sample=False, suppress_tokens=ids, cache_implementation="static", **said
                )
                assert torch.equal(got, want)


@pytest.mark.parametrize("method", ["random", "fastv"])
@pytest.mark.parametrize("cache", ["static", None])
def test_embeddings_without_ids(method, cache):
    model = shared("llava")
    embeds = model.get_input_embeddings()(torch.randint(3, 50, (1, 12)))
    for ratio in (0, options(method)["ratio"]):
        knobs = options(method) | dict(ratio=ratio)
        match = "stores every layer" if cache and method == "fastv" else "inputs_embeds without input_ids"
        with model.compressed(method, **knobs), pytest.raises(ValueError, match=match):
            model.generate(inputs_embeds=embeds, **GREEDY, cache_implementation=cache)


@pytest.mark.parametrize("method", ["uniform", "knorm"])
@pytest.mark.parametrize("kind", ["offloaded", "quantized"])
def test_caches_of_other_kinds(method, kind):
    """Refused for what they are: they do not store layers at full length."""
    model = shared("llava")
    with compressed(model, method), pytest.raises(ValueError, match=f"{kind}.*layers of its own") as refused:
        model.generate(**batch_of("llava"), **GREEDY, cache_implementation=kind)
    assert "full length" not in str(refused.value)


def test_a_block_takes_off_only_its_own_compression():
    """What is compressed anew inside stays, and an exception of the block comes out as it is."""
    model = tiny.build("llama")
    with model.compressed("knorm", ratio=0.5):
        model.decompress()
        model.compress("streaming", ratio=0.5)
    assert model.compression.config.methods[0].method == "streaming"
    model.decompress()
    with pytest.raises(KeyError, match="own"), model.compressed("knorm", ratio=0.5):
        model.decompress()
        raise KeyError("own")
    assert model.compression is None


def test_the_report_speaks_of_the_prompt_not_of_the_guidance_beside_it():
    """Classifier-free guidance feeds an unconditional prompt in between."""
    model = tiny.build("llava")
    batch = tiny.inputs("llava", model)
    with model.compressed("uniform", ratio=0.5):
        model.generate(**batch, **GREEDY)
        expected = model.compression.last
        model.generate(**batch, **GREEDY, guidance_scale=1.5)
        assert model.compression.last.prompt_tokens == expected.prompt_tokens
        assert model.compression.last.visual_kept == expected.visual_kept
