"""Language models some of whose layers keep a state: it must never read a slot that only fills up a ragged batch."""

import pytest
import torch
from transformers import DynamicCache

from tests import tiny
from tests.invariants.reference import (
    alone,
    assert_restored,
    bare,
    batch_of,
    close,
    fresh,
    greedy,
    logits_of,
    shared,
    short_logits,
    snapshot,
)
from tests.tiny import HYBRIDS, IMG

hybrids = pytest.mark.parametrize("name", HYBRIDS)


def states(cache):
    """What the layers without entries hold, in order: (B, ...) each."""
    held = [layer for layer in cache.layers if hasattr(layer, "conv_states")]
    return [
        s
        for layer in held
        for kind in (layer.conv_states, layer.recurrent_states)
        for s in kind.values()
        if s is not None
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@hybrids
def test_states_are_those_of_the_short_prompt(name, side):
    """Of every sample of a padded batch: the states after its prompt are what the bare model keeps of the rows that
    stay, read alone. (The bare model itself spoils those of rows that are padded at the right.)"""
    model, batch = shared(name), batch_of(name, side=side)
    with model.compressed("uniform", ratio=0.5), torch.no_grad():
        together, kept = model(**batch).past_key_values, model.compression.last.visual_kept
        for row in range(2):
            sample = alone(name, batch, row)
            single = model(**sample).past_key_values
            assert states(together)
            for mine, whole in zip(states(single), states(together)):
                close(mine[0], whole[row])
            tokens = greedy(model, sample).tokens[0]
            close(greedy(model, sample).logits[0], short_logits(name, sample, tokens, kept[row]))


@hybrids
def test_layers_with_a_state_stay_those_of_transformers(name):
    """And hold nothing that the report would count."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("uniform", ratio=0.5), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        kinds = [type(layer) for layer in cache.layers]
        model(**batch, past_key_values=cache)
        last = model.compression.last
    keeps = [hasattr(layer, "conv_states") for layer in cache.layers]
    assert any(keeps) and not all(keeps)
    for layer, kind, keep, entries, size in zip(cache.layers, kinds, keeps, last.cache_tokens, last.cache_bytes):
        assert (type(layer) is kind) == keep == (entries == [0, 0]) == (size == 0)


@hybrids
def test_counts_that_differ_behind_a_cache_are_refused(name):
    """Fillers behind what a state has read: one at a time the same turns go."""
    model = shared(name)
    first, second = [[1, 5, IMG, 7, 8], [1, 5, IMG, 7, 8]], [[IMG, 20, 21], [20, 21, 22]]

    def talk(rows):
        base, new = (tiny.batch(name, model, [side[b] for b in rows]) for side in (first, second))
        with torch.no_grad():
            cache = model(**base).past_key_values
            ids = torch.cat([base["input_ids"], new["input_ids"]], 1)
            given = {k: v for k, v in new.items() if k not in ("input_ids", "attention_mask")}
            mask = torch.cat([base["attention_mask"], new["attention_mask"]], 1)
            positions = {}
            if hasattr(model.base_model, "get_rope_index"):
                positions["position_ids"] = torch.arange(ids.shape[1]).expand(3, len(rows), -1)
                positions["position_ids"] = positions["position_ids"][..., base["input_ids"].shape[1] :]
            return model(input_ids=new["input_ids"], attention_mask=mask, past_key_values=cache, **given, **positions)

    with model.compressed("uniform", ratio=0.5):
        for row in range(2):
            talk([row])
        with pytest.raises(ValueError, match=r"past_key_values.*slots per sample would only fill up.*one by one"):
            talk([0, 1])


@hybrids
def test_chunks(name):
    """Of one sample as a whole; of a ragged batch, or where all of a chunk goes, they are refused."""
    model = shared(name)
    with model.compressed("uniform", ratio=0.5):
        for row in range(2):
            sample = alone(name, batch_of(name), row)
            for size in (5, 16):
                close(greedy(model, sample, prefill_chunk_size=size).logits, greedy(model, sample).logits)
        with pytest.raises(ValueError, match=r"prefill_chunk_size.*slots per sample would only fill up"):
            greedy(model, batch_of(name), prefill_chunk_size=5)
    with model.compressed("uniform", keep=1), pytest.raises(ValueError, match="prefill_chunk_size"):
        greedy(model, alone(name, batch_of(name), 0), prefill_chunk_size=3)


@hybrids
def test_ready_made_masks(name):
    """A mask per kind of layer says which rows are real; one for attention alone hides no filler from a state."""
    model, batch = shared(name), batch_of(name)
    real = batch["attention_mask"].bool()
    see = real[:, None, None] & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    see = see | torch.eye(real.shape[1], dtype=torch.bool)
    rest = {k: v for k, v in batch.items() if k != "attention_mask"}
    positions = {}
    if hasattr(model.base_model, "get_rope_index"):
        given = {k: v for k, v in batch.items() if not k.startswith("pixel_values")}
        positions["position_ids"] = model.base_model.get_rope_index(**given)[0]
    (kind,) = set(model.config.get_text_config().layer_types) - {"full_attention"}
    with model.compressed("uniform", ratio=0.5):
        expected = logits_of(model, batch)
        for padding in (real, real.long()):
            masks = {"full_attention": see, kind: padding}
            close(logits_of(model, rest, attention_mask=masks, **positions)[real], expected[real])
        with pytest.raises(ValueError, match=r"attention_mask.* layers of .* that keep a state would carry it over"):
            logits_of(model, rest, attention_mask=see, **positions)
        causal = torch.ones_like(see).tril()  # of rows that are all real, of which not all have as many that stay
        with pytest.raises(ValueError, match=r"attention_mask: the layers of .* that keep a state would read .* slots"):
            logits_of(model, rest, attention_mask=causal, **positions)


@hybrids
def test_equal_samples_without_a_mask(name):
    """No filler, no refusal: two copies of a sample, under whatever mask."""
    model, sample = shared(name), alone(name, batch_of(name), 1)
    twice = {k: torch.cat([v, v]) for k, v in sample.items() if k != "attention_mask"}
    with model.compressed("uniform", ratio=0.5):
        close(logits_of(model, twice)[:1], logits_of(model, sample))


@pytest.mark.parametrize("method", ["fastv", "snapkv", "aim", "kivi"])
@hybrids
def test_other_stages_are_refused_with_the_reason(name, method):
    model = fresh(name)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"has vision only \(layers that keep a state have no entries.*'divprune'|needs"
    ):
        model.compress(method, ratio=0.5)
    assert_restored(model, before)


@hybrids
def test_rows_of_several_samples_are_refused(name):
    model, sample = shared(name), alone(name, batch_of(name), 1)
    n = sample["input_ids"].shape[1]
    twice = {k: torch.cat([v, v], int(k in tiny.TOKEN_KEYS)) for k, v in sample.items() if k != "attention_mask"}
    one = torch.arange(n).repeat(2)[None]
    positions = one.expand(4, 1, -1) if hasattr(model.base_model, "get_rope_index") else one
    with model.compressed("uniform", ratio=0.5), pytest.raises(ValueError, match="would carry it over to rows"):
        model(**twice, position_ids=positions, use_cache=False)


@hybrids
def test_drafting_is_refused(name):
    """transformers takes back no token that a state has read."""
    with shared(name).compressed("uniform", ratio=0.5), pytest.raises(ValueError, match="cannot decode by candidates"):
        shared(name).compression.drafting()


def test_a_bias_in_the_convolutions():
    """Then padding is not neutral on the bare model either."""
    model = fresh("lfm2_vl")
    model.config.text_config.conv_bias = True
    with pytest.raises(ValueError, match="conv_bias=True"):
        model.compress("uniform", ratio=0.5)


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_other_kinds_of_layers_are_refused(name):
    model = fresh(name)
    model.config.text_config.layer_types = ["full_attention", "mamba"] * 2
    with pytest.raises(ValueError, match="of the type mamba, served are"):
        model.compress("uniform", ratio=0.5)
    assert bare(name).config.text_config.layer_types != model.config.text_config.layer_types
