"""copy.deepcopy, pickle and torch.save of a compressed model, and threads beside them."""

import copy
import io
import pickle

import pytest
import torch

from tests.ecosystem.cases import CONFIGS, STACK, hooks, outputs, same
from tests.tiny import build, inputs


@pytest.fixture(scope="module")
def expected():
    """Outputs of the bare model and of each compression."""
    model = build("llava")
    batch, found = inputs("llava", model), {}
    found["none"] = outputs(model, batch)
    for name, config in CONFIGS.items():
        with model.compressed(config):
            found[name] = outputs(model, batch)
    assert len({out[1].sum().item() for out in found.values()}) == len(found)  # every one has an effect of its own
    return batch, found


@pytest.mark.parametrize("name", CONFIGS)
def test_deepcopy_is_compressed_and_independent(name, expected):
    batch, found = expected
    model = build("llava").compress(CONFIGS[name])
    outputs(model, batch)  # after a call: nothing of it is in the way
    twin = copy.deepcopy(model)
    assert same(outputs(twin, batch), found[name])
    assert twin.compression is not model.compression and twin.compression.context.model is twin
    assert twin.compression.last == model.compression.last

    twin.decompress()
    assert same(outputs(twin, batch), found["none"])
    assert same(outputs(model, batch), found[name])
    assert twin.compression is None and model.compression is not None

    twin.compress("uniform", ratio=0.25)
    assert same(outputs(model, batch), found[name])
    model.decompress()
    assert twin.compression.config.methods[0].method == "uniform"
    assert same(outputs(model, batch), found["none"])


def test_the_weights_of_a_copy_are_its_own(expected):
    batch, found = expected
    model = build("llava").compress(STACK)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert same(outputs(model, batch), found["stack"])
    assert not outputs(twin, batch)[0].any()


def test_a_copy_of_a_plain_model_is_compressed_alone(expected):
    batch, found = expected
    model = build("llava")
    twin = copy.deepcopy(model).compress(STACK)
    assert same(outputs(model, batch), found["none"])
    assert same(outputs(twin, batch), found["stack"])
    assert model.compression is None and not hasattr(model.config, "compression_config")


@pytest.mark.parametrize("name", CONFIGS)
def test_pickle(name, expected):
    batch, found = expected
    model = build("llava")
    clean = hooks(model)
    back = pickle.loads(pickle.dumps(model.compress(CONFIGS[name])))
    assert same(outputs(back, batch), found[name])
    assert back.compression.context.model is back
    assert back.compression.config == model.compression.config
    again = pickle.loads(pickle.dumps(build("llava").compress(CONFIGS[name])))
    again.decompress()
    assert hooks(again) == clean
    assert same(outputs(again, batch), found["none"])


def test_torch_save_and_load(expected):
    batch, found = expected
    file = io.BytesIO()
    torch.save(build("llava").compress(STACK), file)
    file.seek(0)
    assert same(outputs(torch.load(file, weights_only=False), batch), found["stack"])


def test_state_dicts_do_not_know_of_the_compression(expected):
    batch, found = expected
    model, plain = build("llava").compress(STACK), build("llava")
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
    plain.load_state_dict(model.state_dict())
    assert same(outputs(plain, batch), found["none"])


def test_a_compressed_cache_can_be_copied_and_pickled(expected):
    """As a chat does that keeps the cache of a common prefix."""
    batch, _ = expected
    model = build("llava").compress(STACK)
    with torch.no_grad():
        cache = model(**batch).past_key_values
        turn = {
            "input_ids": torch.tensor([[5, 6], [7, 8]]),
            "attention_mask": torch.cat([batch["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1),
        }
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            out = model(**turn, past_key_values=other).logits
            expected_logits = model(**turn, past_key_values=copy.deepcopy(cache)).logits
            assert torch.equal(out, expected_logits)
