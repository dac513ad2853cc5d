"""Samples packed into one row are what each of them is alone: logits of every row, losses, gradients, kept sets."""

import itertools

import pytest
import torch
import transformers
from transformers.masking_utils import flash_attention_mask

import hf_compress
from hf_compress.engine import packing
from tests import tiny
from tests.invariants.reference import (
    VLMS,
    acts_inside_layers,
    alone,
    cases,
    close,
    compressed,
    fresh,
    greedy,
    mrope,
    of_kind,
    on_output,
    options,
    prompt_positions,
    refusal,
    shared,
)
from tests.invariants.test_training import step
from tests.tiny import BOS, IMG, PER_ROW, TOKEN_KEYS
from tests.tiny.text import VOCAB
from tests.tiny.vision import GEMMA3_WINDOW

PROMPTS = [[BOS, 5, IMG, 7, 8, 9], [BOS, 11, 12, 13, 14], [IMG, 21, IMG, *range(22, 40)], [BOS, 41, 42, IMG, 43]]


def samples_of(name, prompts=PROMPTS, delimiters=True):
    """Each prompt alone, with labels on the text behind its first token."""
    batch = tiny.batch(name, shared(name), prompts, delimiters=delimiters)
    out = []
    for row in range(len(prompts)):
        sample = alone(name, batch, row)
        sample["labels"] = sample["input_ids"].masked_fill(sample["input_ids"] >= VOCAB - 10, -100)
        sample["labels"][:, 0] = -100
        out.append(sample)
    return out


def positions_of(name, sample):
    """(B, L), on M-RoPE (4, B, L) with those of the text in front."""
    at = prompt_positions(name, {k: v for k, v in sample.items() if k != "labels"})
    text = sample["attention_mask"].cumsum(1) - 1
    return torch.cat([text[None], at.expand(3, -1, -1)]) if mrope(name) else at


def packed(name, samples):
    """One row of all of them, as collators pack it: positions start anew, no mask."""
    out = {"position_ids": torch.cat([positions_of(name, s) for s in samples], -1)}
    for key in dict.fromkeys(key for sample in samples for key in sample if key != "attention_mask"):
        rowwise = key in (*TOKEN_KEYS, "labels") or (name in PER_ROW and key.startswith("pixel"))
        out[key] = torch.cat([s[key] for s in samples if key in s], 1 if rowwise else 0)
    return out


def parts(samples, x):
    """(1, L, ...) of a packed row to that of each sample."""
    return x[0].split([s["input_ids"].shape[1] for s in samples])


@torch.no_grad()
def run(model, inputs):
    return model(**inputs, use_cache=False)


def blocks_of(name, samples):
    """What the rows of each sample see of each other: an image sees itself on Gemma, a prompt on PaliGemma."""
    for sample in samples:
        n = sample["input_ids"].shape[1]
        see = torch.ones(n, n, dtype=torch.bool).tril()
        types = sample.get("token_type_ids")
        if name == "paligemma":
            see |= types[0] == 0
        elif types is not None:
            number = (types[0].diff(prepend=types[0, :1] * 0) == 1).cumsum(0) * types[0]
            see |= (number[:, None] == number) & (number > 0)
        yield see


def own_mask(name, samples, additive):
    """A mask of the caller's own that keeps the samples of a packed row apart; one per kind of layer on Gemma 3."""
    see = torch.block_diag(*blocks_of(name, samples))[None, None]
    at = torch.arange(see.shape[-1])
    kinds = {"full_attention": see, "sliding_attention": see & (at[:, None] - at < GEMMA3_WINDOW)}
    if additive:
        least = torch.finfo(torch.float32).min
        kinds = {kind: torch.zeros(see.shape).masked_fill(~mask, least) for kind, mask in kinds.items()}
    return kinds if name == "gemma3" else kinds["full_attention"]


def check(model, samples, row):
    """Logits of all rows, loss and kept sets of a packed row against each sample alone."""
    out, compression = run(model, row), getattr(model, "compression", None)
    last, start, losses, images = compression and compression.last, 0, [], []
    rows = [[] for _ in last.layer_index] if last else []
    for sample, logits in zip(samples, parts(samples, out.logits)):
        single = run(model, sample)
        close(logits, single.logits[0])
        if labels := int((sample["labels"][:, 1:] != -100).sum()):
            losses.append((single.loss, labels))
        n = sample["input_ids"].shape[1]
        single = compression.last if compression and n > 1 else None  # a single token is a step, which nothing records
        images += single.visual_kept[0] if single else []
        for i, mine in enumerate(rows):
            mine += [start + at for at in (single.layer_index[i][0] if single else [0])]
        start += n
    close(out.loss, sum(loss * n for loss, n in losses) / sum(n for _, n in losses))
    if last:
        assert last.visual_kept == [images] and [layer[0] for layer in last.layer_index] == rows


# Where the bare model mixes up the images of a packed row, or carries a state from one sample to the next.
PACKED = [name for name in VLMS if name not in ("gemma3", *tiny.HYBRIDS)]
if transformers.__version__.startswith("5.23."):
    PACKED.remove("paligemma")  # likewise, until then
OWN_MASK = ["llava", "qwen2_5_vl", "gemma3", "paligemma", "idefics3"]
VISION = [method for method in hf_compress.methods("vision") if refusal(method, "llava") is None]
STAGES = [*VISION, *of_kind("packable")]


def acting(names, inside="packable"):
    """Methods of these stages on the models that take them."""
    return pytest.mark.parametrize(
        ("method", "name"), cases("vision", names) + cases("passing", names) + cases(inside, names)
    )


@pytest.mark.parametrize("name", PACKED)
def test_bare(name):
    """What the tests below rely on."""
    check(shared(name), samples_of(name), packed(name, samples_of(name)))


@acting(PACKED)
def test_packed_is_one_by_one(method, name):
    model, samples = shared(name), samples_of(name)
    with compressed(model, method):
        check(model, samples, packed(name, samples))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@acting(OWN_MASK)
def test_under_a_mask_of_the_callers_own(method, name, attn):
    """With a cache too, on M-RoPE without positions of the text: the mask says all."""
    model, samples = shared(name, attn), samples_of(name)
    row = packed(name, samples) | {"attention_mask": own_mask(name, samples, attn == "eager")}
    if mrope(name):
        row["position_ids"] = row["position_ids"][1:]
    if name == "gemma3":  # alone the model makes such masks itself
        row.pop("token_type_ids")
    check(model, samples, row)
    with compressed(model, method):
        check(model, samples, row)
        with torch.no_grad():
            close(model(**row, use_cache=True).logits, run(model, row).logits)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["original", "renumber"])
@pytest.mark.parametrize("methods", [["uniform"], ["uniform", "fastv"], ["uniform", "pyramiddrop"]])
@pytest.mark.parametrize("name", ["llava", "llava_window", "mistral3"])
def test_gaps_windows_and_lists_of_methods(name, methods, positions, attn):
    model, samples = shared(name, attn), samples_of(name)
    knobs = {"layer": 1} if "fastv" in methods else {}
    with model.compressed(methods, ratio=0.3, positions=positions, **knobs):
        check(model, samples, packed(name, samples))


@acting(["llava", "internvl"], "shrinking")
def test_budgets_are_those_of_each_sample(method, name):
    """An absolute one, over samples with one image, two and none, and nothing but an image; where images stand so near
    that they would be tiles of one picture, were they of one sample."""
    prompts = [[IMG], [IMG, 5], *PROMPTS, [7], [IMG, IMG, 8, 9]]
    model, samples = shared(name), samples_of(name, prompts, delimiters=False)
    with compressed(model, method, keep=27 if name == "llava" else 6):
        check(model, samples, packed(name, samples))


@pytest.mark.parametrize("method", STAGES)
def test_several_packed_rows(method):
    """Of different lengths after the cut, and with other numbers of samples."""
    model = shared("llava")
    prompts = [*PROMPTS, [BOS, *range(3, 68), 12], [BOS, 7, 8, 9, *range(40, 70), IMG, 60, IMG], [3, 4, 5]]
    samples = samples_of("llava", prompts)
    rows = [packed("llava", some) for some in (samples[:4], samples[4:])]
    assert rows[0]["input_ids"].shape[1] == rows[1]["input_ids"].shape[1]
    batch = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    with compressed(model, method):
        together = run(model, batch).logits
        for row, logits in zip(rows, together):
            close(logits, run(model, row).logits[0])


@pytest.mark.parametrize("method", STAGES)
def test_answers_that_share_a_prompt(method):
    """Several samples behind one prompt, each of which sees it and itself: positions go on behind it."""
    prompt, answers = [BOS, 5, IMG, 7, 8], ([20, 21, 22], [30, 31], [40, 41, 42, 43])
    model = shared("llava")
    samples = samples_of("llava", [prompt + answer for answer in answers])
    n = samples[0]["input_ids"].shape[1] - len(answers[0])
    whole = samples[0]["input_ids"][:, :n]
    row = {"input_ids": torch.cat([whole, torch.tensor([[token for answer in answers for token in answer]])], 1)}
    places = [torch.arange(n), *(n + torch.arange(len(answer)) for answer in answers)]
    row["position_ids"] = torch.cat(places)[None]
    see = torch.block_diag(*(torch.ones(len(p), len(p), dtype=torch.bool).tril() for p in places))
    see[n:, :n] = True
    row |= {"attention_mask": see[None, None], "pixel_values": samples[0]["pixel_values"]}
    for sample in samples:
        sample["labels"][:, :n] = -100
        sample["pixel_values"] = row["pixel_values"]
    row["labels"] = torch.cat([torch.full_like(whole, -100), row["input_ids"][:, n:]], 1)
    with compressed(model, method):
        out = run(model, row).logits[0]
        for sample, logits in zip(samples, out[n:].split([len(answer) for answer in answers])):
            alone = run(model, sample).logits[0]
            close(torch.cat([out[:n], logits]), alone)


def test_what_a_collator_gives():
    """`DataCollatorWithFlattening` with everything that it can say beside the positions; labels on answers alone."""
    model, samples = shared("llava"), samples_of("llava")
    for sample in samples:
        sample["labels"][:, :-3] = -100
    rows = [{key: sample[key][0].tolist() for key in ("input_ids", "labels")} for sample in samples]
    collate = transformers.DataCollatorWithFlattening(
        return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True
    )
    pixels = torch.cat([sample["pixel_values"] for sample in samples if "pixel_values" in sample])
    for methods, knobs in ((["uniform", "fastv"], {"layer": 1}), (["random", "pyramiddrop"], {})):
        with model.compressed(methods, ratio=0.3, **knobs):
            check(model, samples, collate(rows) | {"pixel_values": pixels})


def by_lengths(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, position_ids=None, **_):
    """What flash attention does with a packed row: causal within the lengths, or from each smallest position on."""
    assert mask is None
    ends = cu_seq_lens_q
    if ends is None:
        ends = torch.cat([(position_ids[0] == position_ids.min()).nonzero()[:, 0], torch.tensor([query.shape[2]])])
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    out = []
    for a, b in itertools.pairwise(ends.tolist()):
        some = (t[:, :, a:b] for t in (query, key, value))
        out.append(torch.nn.functional.scaled_dot_product_attention(*some, is_causal=True, scale=scaling))
    return torch.cat(out, 2).transpose(1, 2), None


@pytest.mark.parametrize("said", ["positions", "lengths", "a mask of ones, a cache"])
@pytest.mark.parametrize("positions", ["original", "renumber"])
@pytest.mark.parametrize("method", [m for m in VISION if m in of_kind("before")])
def test_kernels_that_take_lengths(method, positions, said, monkeypatch):
    """Flash attention is told the lengths of the samples, or finds them in the positions; whatever else is passed.

    Methods whose tokens pass give layers masks of their own, which such kernels do not take."""
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "flash_by_hand", by_lengths)
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "flash_by_hand", flash_attention_mask)
    model, samples = fresh("llava"), samples_of("llava")
    model.config.text_config._attn_implementation_internal = "flash_by_hand"
    row = packed("llava", samples)
    if said == "lengths":
        counts = torch.tensor([0, *(sample["input_ids"].shape[1] for sample in samples)])
        ends = counts.cumsum(0).int()
        row |= dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=counts.max(), max_length_k=counts.max())
        del row["position_ids"]  # rotations know differences only
    with model.compressed(method, positions=positions, **options(method, model)):
        check(model, samples, row)
        if said == "lengths":
            several = {k: torch.cat([v, v]) for k, v in row.items() if k in ("input_ids", "pixel_values")}
            with pytest.raises(ValueError, match="cu_seq_lens_q"):
                model(**several, cu_seq_lens_q=torch.cat([ends, ends[1:] + ends[-1]]))
        if said == "a mask of ones, a cache":
            with torch.no_grad():
                more = model(**row, attention_mask=torch.ones_like(row["input_ids"]), use_cache=True)
            close(more.logits, run(model, row).logits)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", [*STAGES, "snapkv", "kivi"])
def test_training(method, name, checkpointed):
    """The gradient of a packed row is the sum of those of its samples; cache methods pass where nothing is cached."""
    model, samples = fresh(name), samples_of(name)
    model.compress(method, **options(method, model), **on_output(method))
    model.train()
    if checkpointed and acts_inside_layers(method):
        return  # refused: test_training.py
    if checkpointed:  # which caches nothing either
        model.gradient_checkpointing_enable()
    else:
        model.config.get_text_config().use_cache = False
    counts = [int((sample["labels"][:, 1:] != -100).sum()) for sample in samples]
    _, together = step(model, packed(name, samples))
    own = [step(model, sample)[1] for sample in samples]
    for key, grad in together.items():
        some = [part.get(key, torch.zeros_like(grad)) for part in own]
        expected = sum(part * n for part, n in zip(some, counts)) / sum(counts)
        torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-3)


def calls(samples):
    """A packed row and what callers may say beside it."""
    row = packed("llava", samples)
    flat = {"attention_mask": torch.ones_like(row["input_ids"])}
    block = row | {"attention_mask": own_mask("llava", samples, False)}
    del block["position_ids"]
    lengths = {"cu_seq_lens_q": torch.tensor([0, 9, row["input_ids"].shape[1]])}
    return row, flat, block, lengths


@pytest.mark.parametrize("method", ["snapkv", "kivi", "uniform", "fastv"])
def test_refused_where_the_model_reads_one_sample(method):
    """In generation; with a cache or a 2-D mask, where samples read each other in the bare model; cache methods
    wherever there is a cache. What comes next is right."""
    model, samples = shared("llava"), samples_of("llava")
    row, flat, block, lengths = calls(samples)
    one = {key: value for key, value in samples[0].items() if key != "labels"}
    with compressed(model, method), torch.no_grad():
        plain = model(**one).logits
        evicts = hf_compress.methods()[method].stage == "cache"
        for extra in ({}, flat):
            with pytest.raises(ValueError, match=r"position_ids: .*start anew"):
                model(**row, **extra)
        for extra in (row, row | flat, row | {"inputs": row["input_ids"], "input_ids": None}):
            extra = {k: v for k, v in extra.items() if k != "labels" and v is not None}
            with pytest.raises(ValueError, match=r"position_ids: .*start anew"):
                model.generate(**extra, max_new_tokens=2)
        if evicts:
            with pytest.raises(ValueError, match=r"attention_mask: .*do not see"):
                model(**block)
            with pytest.raises(ValueError, match="cu_seq_lens_q"):
                model(input_ids=row["input_ids"], pixel_values=row["pixel_values"], **lengths)
        else:
            with pytest.raises(ValueError, match=r"position_ids: .*start anew"):
                model(**row, **flat, use_cache=False)
        assert torch.equal(model(**one).logits, plain)
        close(greedy(model, one).logits[:, 0], plain[:, -1])


def test_positions_that_are_not_packed_are_left_alone():
    """Padding, gaps, several tokens at one position."""
    model = shared("llava")
    batch = tiny.batch("llava", model, [[BOS, 5, IMG, 7, 8, 9], [BOS, 11, 12]])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for method in ("fastv", "snapkv", "uniform"):
        for fill in (0, 1):
            with compressed(model, method), torch.no_grad():
                at = positions.masked_fill(batch["attention_mask"] == 0, fill)
                close(model(**batch, position_ids=at).logits[0], model(**batch).logits[0])
                apart = at + 3 * (torch.arange(at.shape[1]) > 20)
                shared_place = at - (torch.arange(at.shape[1]) > 20).long()
                assert all(model(**batch, position_ids=p).logits.isfinite().all() for p in (apart, shared_place))


def test_looking_for_samples_costs_nothing_elsewhere(monkeypatch):
    """Nobody looks at positions or masks in generation, or in training with a 2-D mask: that waits for the device."""
    model, (sample, *_) = shared("llava"), samples_of("llava")
    for name in ("of_mask", "of_firsts"):
        monkeypatch.setattr(packing, name, lambda *_, **__: pytest.fail("looked"))
    for method in ("uniform", "fastv", "snapkv"):
        with compressed(model, method):
            model(**sample).loss.backward()
            greedy(model, {k: v for k, v in sample.items() if k != "labels"})
