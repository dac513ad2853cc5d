"""What made an answer: whatever acts on it changes its identity, and nothing else does."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model

import hf_compress
from hf_compress.evaluate import sweep
from hf_compress.evaluate.identity import SAMPLE, fingerprint, made_by
from hf_compress.evaluate.prompts import encode
from hf_compress.evaluate.tasks import load_task

SMALL = dict(methods=["uniform"], ratios=[0.5], limit=2, batch_size=2, timed=False, progress=False, device="cpu")


def of(weight):
    """Of a model that is this tensor alone."""
    model = torch.nn.Module()
    model.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    return fingerprint(model)


def test_weights():
    small, large = torch.randn(10, 10), torch.randn(2 * SAMPLE + 17, 3)
    for weight in (
        small,
        large,
        large.bfloat16(),
        torch.tensor(3.0),
        torch.randint(0, 9, (4, 4), dtype=torch.uint8).float(),
    ):
        assert of(weight) == of(weight.clone()) == of(weight.t().contiguous().t())  # wherever and however it lies
        for at in (0, -1):
            other = weight.clone()
            other.view(-1)[at] += 1
            assert of(other) != of(weight)
        assert of(weight.double()) != of(weight) != of(weight[None])
    rows = large.clone()
    rows[SAMPLE] = 0  # one row of an embedding, as where a new token is trained
    assert of(rows) != of(large)
    assert of(torch.empty(0)) != of(torch.empty(0, 1))


def test_buffers_names_and_adapters_count():
    plain = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)) for _ in range(2)]
    plain[1].load_state_dict(plain[0].state_dict())
    before = fingerprint(plain[0])
    assert before == fingerprint(plain[1])
    plain[1][1].running_mean += 1
    assert fingerprint(plain[1]) != before
    assert fingerprint(torch.nn.Sequential(plain[0])) != before
    model = get_peft_model(plain[0], LoraConfig(target_modules=["0"], init_lora_weights=False), adapter_name="one")
    model.add_adapter("two", LoraConfig(target_modules=["0"], init_lora_weights=False))
    found = [fingerprint(model)]
    model.set_adapter("two")
    found.append(fingerprint(model))
    with model.disable_adapter():
        found.append(fingerprint(model))
    assert len({before, *found}) == 4


def test_computed_buffers_count_without_their_last_bit():
    """Rotary frequencies come out of a power that processors round differently; other frequencies are another model."""
    module = torch.nn.Module()
    module.register_buffer("kept", torch.linspace(0.1, 1, 24), persistent=True)
    module.register_buffer("computed", torch.linspace(0.1, 1, 24), persistent=False)
    before = fingerprint(module)
    module.computed = torch.nextafter(module.computed, torch.ones(24))
    assert fingerprint(module) == before
    module.computed = 1.01 * module.computed
    assert fingerprint(module) != before
    module.computed = torch.linspace(0.1, 1, 24)
    module.kept = torch.nextafter(module.kept, torch.ones(24))
    assert fingerprint(module) != before


def test_weights_that_are_offloaded_are_read():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    before = fingerprint(model)
    cpu_offload(model, execution_device="cpu")
    assert model[0].weight.device.type == "meta" and fingerprint(model) == before


def test_using_and_reloading_change_nothing(demo):
    model, processor = demo
    before = made_by(model, processor)
    task = load_task("demo:scenes", 2)
    inputs = encode(processor, task.shown([0, 1]), task.questions)
    with model.compressed("divprune", ratio=0.5):
        model.generate(**inputs, max_new_tokens=2)
    processor.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    assert made_by(model, processor) == before == made_by(*hf_compress.load_demo("llava"))
    assert before["weights"] != made_by(*hf_compress.load_demo("qwen"))["weights"]


def trained(model, processor):
    model.lm_head.weight.data[0, 0] += 1


def later_layer(model, processor):
    model.config.vision_feature_layer = -1


def cooler(model, processor):
    model.generation_config.repetition_penalty = 1.2


def eager(model, processor):
    model.set_attn_implementation("eager")


def brighter(model, processor):
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]


def other_words(model, processor):
    processor.tokenizer.add_tokens(["crimson"])


def other_template(model, processor):
    processor.chat_template = processor.chat_template.replace("USER", "HUMAN")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (trained, {"weights"}),
        (later_layer, {"config"}),
        (cooler, {"generation"}),
        (eager, {"attention"}),
        (brighter, {"processor"}),
        (other_words, {"processor"}),
        (other_template, {"template"}),
    ],
)
def test_what_acts_on_answers_is_told_apart_by_name(change, names, demo):
    model, processor = (copy.deepcopy(part) for part in demo)
    before = made_by(model, processor)
    change(model, processor)
    after = made_by(model, processor)
    assert {name for name in before if before[name] != after[name]} == names


def test_measurements_beside_the_checkpoint_count(demo, tmp_path):
    model = copy.deepcopy(demo[0])
    model.name_or_path = str(tmp_path)
    found = [made_by(model, demo[1])]
    for content in ("[1]", "[2]"):
        (tmp_path / "retrieval_heads.json").write_text(content)
        found.append(made_by(model, demo[1]))
    assert "retrieval_heads.json" not in found[0] and found[1] != found[2]


def test_a_folder_of_other_makers_is_refused_with_both_named(demo, tmp_path, monkeypatch):
    """Nothing is asked, and the folder stays as it was."""
    model, processor = copy.deepcopy(demo[0]), demo[1]
    sweep(model, "demo:scenes", processor=processor, out=tmp_path, **SMALL)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    was = made_by(model, processor)["weights"]
    with monkeypatch.context() as patch:
        patch.setattr(hf_compress, "__version__", "9.9")
        with pytest.raises(ValueError, match=r"hf_compress='.*' \(now '9\.9'\)"):
            sweep(model, "demo:scenes", processor=processor, out=tmp_path, **SMALL)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    now = made_by(model, processor)["weights"]
    with pytest.raises(ValueError, match=rf"weights='{was}' \(now '{now}'\)"):
        sweep(model, "demo:scenes", processor=processor, out=tmp_path, **SMALL)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
