"""Budgets layer by layer: the same as a method that gives each layer as much; swapped while the hooks stay."""

import json
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch

import hf_compress
from hf_compress import CompressionConfig, Schedule, budget, registry
from hf_compress.methods.base import DecoderMethod
from hf_compress.methods.cache.knorm import KNorm
from hf_compress.methods.cache.snapkv import SnapKV
from tests.ecosystem.cases import hooks
from tests.invariants.reference import alone, batch_of, fresh, greedy, shared
from tests.tiny import LLAVA_TOKENS, build, inputs

N = LLAVA_TOKENS  # of every image
ROWS = [N, 20, 20, 7]


@dataclass
class ByHand(DecoderMethod):
    """The plan of `rows`, written down by itself."""

    rows: tuple = ()

    def plan(self, layers, tokens, ratio):
        counts = [min(tokens, n * (tokens // N)) for n in self.rows]
        return {i: n for i, n in enumerate(counts) if i and n < counts[i - 1]}


@dataclass
class Waits(ByHand):
    """The same rows wait in one layer and go through the next."""

    waits = True

    def plan(self, layers, tokens, ratio):
        return {i: min(tokens, n * (tokens // N)) for i, n in enumerate(self.rows) if n < N}


@dataclass
class Levels(SnapKV):
    """SnapKV that gives every layer what `levels` says."""

    levels: tuple = ()

    def layer_budget(self, budget, lengths, layer, layers):
        return torch.full_like(lengths, self.levels[layer])


@dataclass
class NormLevels(KNorm):
    """The same of a method that holds its budget."""

    levels: tuple = ()

    def layer_budget(self, budget, lengths, layer, layers):
        return torch.full_like(lengths, self.levels[layer])


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry.methods()))
    for name, cls in (("by_hand", ByHand), ("waits", Waits)):
        registry.register(name, stage="decoder", paper="control", needs={"visual"})(cls)
    for name, cls in (("levels", Levels), ("norms", NormLevels)):
        registry.register(name, stage="cache", paper="control")(cls)


def same(a, b):
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.logits, b.logits)


def run(model, batch, *args, **options):
    with model.compressed(*args, **options):
        return greedy(model, batch), model.compression.last


@pytest.mark.parametrize("kind", ["inputs", "mixed", "equal"])
@pytest.mark.parametrize(("method", "levels"), [("by_hand", ROWS), ("waits", [N, 3, N, 7])])
def test_rows_of_every_layer(method, levels, kind):
    model, batch = shared("llava"), batch_of("llava", kind)
    expected, plain = run(model, batch, method, ratio=0.1, rows=tuple(levels))
    found, last = run(model, batch, method, schedule=Schedule(levels, "rows"))
    assert same(found, expected) and last.layer_tokens == plain.layer_tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_those_of_its_samples(side):
    model = shared("llava")
    batch = inputs("llava", model, side=side)
    schedule = Schedule(ROWS, "rows")
    with torch.no_grad(), model.compressed("by_hand", schedule=schedule):
        together = model(**batch).logits
        lengths = model.compression.last.layer_tokens
        for b in range(2):
            single = alone("llava", batch, b)
            rows = batch["attention_mask"][b].bool()
            torch.testing.assert_close(together[b, rows], model(**single).logits[0], rtol=0, atol=2e-5)
            assert [counts[b] for counts in lengths] == [counts[0] for counts in model.compression.last.layer_tokens]


@pytest.mark.parametrize("name", ["llama", "llava", "mistral_window", "gemma3"])
@pytest.mark.parametrize("policy", ["grow", "hold"])
def test_entries_of_every_layer(name, policy):
    model, batch = shared(name), batch_of(name)
    adapter = hf_compress.architectures()[model.config.model_type]
    slides = [adapter.window(model.get_decoder(), i) is not None for i in range(4)]
    if all(slides):
        with pytest.raises(ValueError, match="keeps a sliding window already; its level must be 0"):
            model.compress("norms", schedule=Schedule([3] * 4, "entries"))
        return
    levels = [0 if s else n for s, n in zip(slides, (9, 4, 11, 6))]
    method, knobs = ("norms", {}) if policy == "hold" else ("levels", {"window": 3})
    expected, plain = run(model, batch, method, ratio=0.5, levels=tuple(levels), policy=policy, **knobs)
    found, last = run(model, batch, method, schedule=Schedule(levels, "entries"), policy=policy, **knobs)
    assert same(found, expected) and last.cache_tokens == plain.cache_tokens


def test_more_than_there_is_keeps_all():
    model, batch = shared("llava"), batch_of("llava")
    bare = greedy(model, batch)
    assert same(run(model, batch, "snapkv", schedule=Schedule([500] * 4, "entries"), window=3)[0], bare)
    assert same(run(model, batch, "pyramiddrop", schedule=Schedule([N] * 4, "rows"))[0], bare)


def test_reschedule_leaves_the_hooks():
    model, batch = fresh("llava"), batch_of("llava")
    second, third = Schedule([N, N, 9, 9], "rows"), Schedule([8, 8, 7, 5], "entries")
    expected, _ = run(model, batch, ["by_hand", "snapkv"], schedule=[second, third], window=3)
    model.compress(["by_hand", "snapkv"], schedule=[Schedule(ROWS, "rows"), Schedule([6] * 4, "entries")], window=3)
    before = hooks(model)
    assert not same(greedy(model, batch), expected)
    model.compression.reschedule(second)
    model.compression.reschedule(third.to_dict())
    assert hooks(model) == before
    assert same(greedy(model, batch), expected)
    assert model.compression.config.methods[1].schedule == third and str(third) in repr(model.compression)
    for wrong in (Schedule([4] * 3, "rows"), Schedule([4, 5, 5, 5], "rows")):
        with pytest.raises(ValueError, match=r"levels; .* has 4 decoder layers|rises"):
            model.compression.reschedule(wrong)
    assert same(greedy(model, batch), expected)


def test_only_what_has_one_is_rescheduled():
    with (
        fresh("llava").compressed("snapkv", ratio=0.5, window=3) as model,
        pytest.raises(ValueError, match=r"has no schedule in entries; compress with schedule="),
    ):
        model.compression.reschedule(Schedule([4] * 4, "entries"))


def test_a_cache_of_another_schedule_is_not_continued():
    model, batch = fresh("llama"), batch_of("llama")
    model.compress("snapkv", schedule=Schedule([6] * 4, "entries"), window=3)
    cache = model(**batch, use_cache=True).past_key_values
    model.compression.reschedule(Schedule([5] * 4, "entries"))
    with pytest.raises(ValueError, match="was filled under"):
        model(input_ids=torch.full((2, 1), 5), past_key_values=cache)


def test_it_is_saved_and_read(tmp_path):
    schedule = Schedule([9, 4, 7, 6], "entries")
    model = build("llama").compress("snapkv", schedule=schedule, window=3)
    expected = greedy(model, batch_of("llama"))
    config = model.compression.config
    assert CompressionConfig.from_json(config.to_json()) == config
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    again.generation_config = model.generation_config
    assert again.compression.config == config and same(greedy(again, batch_of("llama")), expected)
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps(schedule.to_dict()))
    for given in (file, str(file), schedule.to_dict(), {"levels": torch.tensor([9, 4, 7, 6]), "unit": "entries"}):
        assert build("llama").compress("snapkv", schedule=given, window=3).compression.config == config


def test_its_cost():
    assert budget.cost(Schedule([16, 12, 12, 5], "rows")) == Fraction(45, 4)
    assert budget.cost(Schedule([0, 10, 0, 30], "entries"), 20) == 15


@pytest.mark.parametrize(
    ("levels", "unit", "message"),
    [
        ([4, 4.5], "rows", "4.5 must be an integer of at least 0"),
        ([4, -1], "rows", "-1 must be an integer"),
        ([True, 4], "rows", "True must be an integer"),
        ([], "rows", "one integer per decoder layer"),
        ("444", "rows", "one integer per decoder layer"),
        ([4, 4], "bits", r"unit='bits' of a schedule must be one of \('rows', 'entries'\)"),
    ],
)
def test_what_is_no_schedule(levels, unit, message):
    with pytest.raises(ValueError, match=message):
        Schedule(levels, unit)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (["snapkv"], {"schedule": Schedule([4] * 4, "rows")}, "is for a method of the decoder stage; 'snapkv' acts in"),
        (["snapkv"], {"schedule": Schedule([4] * 3, "entries")}, "has 3 levels; LlavaForConditionalGeneration has 4"),
        (["snapkv"], {"schedule": Schedule([4, 4, 0, 4], "entries")}, "layer 2 keeps nothing"),
        (["snapkv", 0.5], {"schedule": Schedule([4] * 4, "entries")}, r"goes with neither ratio=0.5"),
        (["kivi"], {"schedule": Schedule([4] * 4, "entries")}, "stores every entry"),
        (["kvzip"], {"schedule": Schedule([4] * 4, "entries")}, "shares one budget between layers"),
        (["by_hand"], {"schedule": Schedule([4, 5, 5, 5], "rows")}, "rises"),
        (["by_hand"], {"schedule": Schedule([9, 5, 5, 5], "rows")}, "drops before layer 0; the model allows"),
        (["fastv"], {"schedule": Schedule([N, N, N, 5], "rows")}, r"'fastv' drops before layers \[3\], .*before \[2\]"),
        (["aim"], {"schedule": Schedule([N] * 4, "rows")}, "acts in several stages; give ratio or keep"),
        (["random"], {"schedule": Schedule([N] * 4, "rows")}, "'random' acts in the vision stage"),
        (["snapkv"], {"schedule": "nowhere.json"}, "'nowhere.json' must be a JSON file of a schedule"),
        (["snapkv"], {"schedule": {"levels": [4]}}, "must be a Schedule, a dict of its levels and unit"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(args, options, message):
    model = shared("llava")
    with pytest.raises(ValueError, match=message):
        model.compress(*args, **options)
    assert model.compression is None
