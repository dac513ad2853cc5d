"""The bridge to lm-eval and lmms-eval: on a stand-in for their model classes, and on lm-eval where it is installed."""

import json
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from hf_compress import demo
from hf_compress.config import CompressionConfig
from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate import answer, harness
from hf_compress.evaluate.harness import compressing, main, register, split_arguments
from tests.tiny import build, inputs, single

TASKS = Path(__file__).parents[1] / "recipes/harness/tasks_lm_eval"


class Stand:
    """What both harnesses have in common: a constructor that loads `model`, and three kinds of requests."""

    def __init__(self, pretrained, batch_size=1, **kwargs):
        self.model, self.kwargs = pretrained, {"batch_size": batch_size, **kwargs}

    def generate_until(self, requests, disable_tqdm=False):
        return [self.model.generate(r, max_new_tokens=3, do_sample=False)[0, -3:].tolist() for r in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        return [float(self.model(r).logits.log_softmax(-1)[0, -1, 5]) for r in requests]

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def ids():
    return [torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_arguments_are_parted():
    given = {"pretrained": "p", "compress": "divprune+snapkv", "ratio": "0.75+0.5", "window": 16, "dtype": "float32"}
    (method, ratio, keep, knobs), rest = split_arguments(given)
    assert (method, ratio, keep, knobs) == (["divprune", "snapkv"], [0.75, 0.5], None, {"window": 16})
    assert rest == {"pretrained": "p", "dtype": "float32"}
    assert split_arguments({"compress": "snapkv", "keep": "8", "ratio": None})[0] == (["snapkv"], None, [8], {})


def test_a_whole_config_is_taken():
    config = CompressionConfig.from_dict({"methods": [{"method": "snapkv", "ratio": 0.5, "knobs": {"window": 4}}]})
    for given in (config, config.to_dict(), config.to_json()):
        (method, *rest), _ = split_arguments({"compress": given, "window": "of the harness"})
        method = CompressionConfig.from_dict(method) if isinstance(method, dict) else method
        assert method == config and rest == [None, None, {}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "compress=None: name a method"),
        ({"compress": 3}, "compress=3: name a method"),
        ({"compress": "snapvk"}, "did you mean 'snapkv'"),
        ({"compress": "snapkv", "ratio": "half"}, "ratio='half'"),
        ({"compress": "snapkv", "keep": "1.5"}, "keep='1.5'"),
    ],
)
def test_wrong_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        split_arguments(given)


def test_generation_is_that_of_the_compressed_model(ids):
    """Ratio 0 changes nothing; otherwise the answers are those of compress() itself, and its knobs arrive."""
    model = build("llama")
    bare = Stand(model).generate_until(ids)
    lm = compressing(Stand)(pretrained=model, compress="snapkv", ratio=0, batch_size=2)
    assert lm.generate_until(ids) == bare and lm.kwargs == {"batch_size": 2}
    model.decompress()
    lm = compressing(Stand)(pretrained=model, compress="snapkv", ratio=0.8, window=4)
    assert model.compression.config.summary() == "snapkv(ratio=0.8, window=4)"
    found = lm.generate_until(ids)
    assert model.compression.last.cache_tokens == [[8]] * model.config.num_hidden_layers
    model.decompress()
    with model.compressed("snapkv", ratio=0.8, window=4):
        assert found == Stand(model).generate_until(ids) != bare


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_scoring_continuations_under_a_cache_method_is_refused(ids, kind):
    """No cache is read there: the full model would be reported as the compressed one."""
    lm = compressing(Stand)(pretrained=build("llama"), compress="streaming", ratio=0.5)
    with pytest.raises(ValueError, match=r"loglikelihood.*streaming\(ratio=0.5\) does nothing.*generate_until"):
        getattr(lm, kind)(ids)
    assert getattr(lm, kind)([]) == []


def test_a_vision_method_scores_continuations(ids, recwarn):
    """A forward does meet it; where the requests show no image it had nothing to do, which is said."""
    model = build("llava")
    prompt = single(inputs("llava", model), 0, "llava")

    class Seeing(Stand):
        def loglikelihood(self, requests):
            return [self.model(**r).logits.shape[1] for r in requests]

    lm = compressing(Seeing)(pretrained=model, compress="uniform", ratio=0.5)
    assert lm.loglikelihood([prompt]) == [prompt["input_ids"].shape[1]] and not recwarn.list
    assert sum(map(sum, model.compression.last.visual_left)) * 2 == sum(map(sum, model.compression.last.visual_tokens))
    with pytest.warns(UserWarning, match="no image in the last batch"):
        lm.loglikelihood_rolling(ids)


def test_errors_that_a_harness_swallows_are_reported(ids):
    """Some models of lmms-eval answer with nothing where `generate` raises."""

    class Swallowing(Stand):
        def generate_until(self, requests):
            return ["" for _ in requests]

    lm = compressing(Swallowing)(pretrained=build("llama"), compress="snapkv", ratio=0.5)
    with pytest.warns(UserWarning, match="no prompt went through"):
        lm.generate_until(ids)


def test_models_and_arguments_that_cannot_be_compressed_are_refused():
    class Named(Stand):
        def __init__(self, pretrained, window=3, **kwargs):
            super().__init__(pretrained, **kwargs)

    with pytest.raises(ValueError, match=r"Stand\.model is str, not a Hugging Face model"):
        compressing(Stand)(pretrained="http://server", compress="snapkv", ratio=0.5)
    with pytest.raises(ValueError, match=r"window is an argument of Named.*compress=\{"):
        compressing(Named)(pretrained=build("llama"), compress="snapkv", ratio=0.5, window=4)
    model = build("llama")
    lm = compressing(Named)(pretrained=model, compress={"methods": [{"method": "snapkv", "ratio": 0.5}]}, window=4)
    assert lm.model is model and model.compression is not None


def test_command_names_what_is_missing(monkeypatch):
    with pytest.raises(SystemExit, match=r"usage: .*\{lm_eval,lmms_eval\}"):
        main(["lm-eval"])
    with pytest.raises(ValueError, match="harness='helm': there are bridges to lm_eval, lmms_eval"):
        register("helm")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match="pip install lm-eval"):
        main(["lm_eval", "--model", "hf-compress"])


def test_command_passes_arguments_on(monkeypatch):
    seen = []
    stand = types.SimpleNamespace(go=lambda: seen.append(list(sys.argv)) or "done")
    monkeypatch.setitem(sys.modules, "stand_in", stand)
    monkeypatch.setitem(harness.COMMANDS, "lm_eval", ("stand_in", "go"))
    monkeypatch.setattr(harness, "register", seen.append)
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert main(["lm_eval", "--tasks", "recall"]) == "done"
    assert seen == ["lm_eval", ["lm_eval", "--tasks", "recall"]]


def test_lmms_eval_builds_the_named_model(monkeypatch):
    """With stand-ins for what lmms-eval offers: the class of `base`, chat or simple, is what gets compressed."""
    asked = []
    api = {
        "lmms_eval": types.ModuleType("lmms_eval"),
        "lmms_eval.api": types.ModuleType("lmms_eval.api"),
        "lmms_eval.api.model": types.SimpleNamespace(lmms=object),
        "lmms_eval.models": types.SimpleNamespace(get_model=lambda *a, **k: asked.append((a, k)) or Stand),
        "lmms_eval.utils": types.SimpleNamespace(simple_parse_args_string=json.loads),
    }
    for name, module in api.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hf_compress.evaluate.harness_lmms", raising=False)
    from hf_compress.evaluate.harness_lmms import Chat, Simple

    monkeypatch.delitem(sys.modules, "hf_compress.evaluate.harness_lmms")
    text = json.dumps({"base": "llava_hf", "pretrained": 0, "compress": "snapkv", "ratio": 0.5})
    for cls in (Simple, Chat):
        with pytest.raises(ValueError, match=r"Stand\.model is int"):
            cls.create_from_arg_string(text, {"batch_size": 1, "device": None})
    assert asked == [(("llava_hf",), {"force_simple": True}), (("llava_hf",), {"force_simple": False})]
    with pytest.raises(ValueError, match="base=None"):
        Simple.create_from_arg_string("{}")


def test_the_chat_template_is_applied_once(ids):
    """Refused on prompts that it has written already, missed where nobody applies it."""

    class Chatting(Stand):
        tokenizer = types.SimpleNamespace(chat_template="USER: ... ASSISTANT:")

        def apply_chat_template(self, history, add_generation_prompt=True):
            return f"USER: {history[-1]['content']} ASSISTANT:"

        def generate_until(self, requests):
            return [self.model.generate(ids[0], max_new_tokens=1) for _ in requests]

    def asked(*texts):
        return [types.SimpleNamespace(args=(text, {})) for text in texts]

    lm = compressing(Chatting)(pretrained=build("llama"), compress="snapkv", ratio=0.5)
    with pytest.warns(UserWarning, match=r"1 of 2 prompts do not end with 'ASSISTANT:'.*--apply_chat_template"):
        lm.generate_until(asked("what ?", "USER: who ? ASSISTANT:"))
    turn = [{"role": "user", "content": "USER: what ? ASSISTANT: "}]
    with pytest.raises(ValueError, match="rendered already: they end with 'ASSISTANT:'"):
        lm.apply_chat_template(turn)
    assert lm.apply_chat_template([{"role": "user", "content": "what ?"}]) == "USER: what ? ASSISTANT:"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.generate_until(asked("USER: what ? ASSISTANT:"))


def test_scenes_of_lm_eval_are_those_of_our_judge():
    """Its evaluator and ours on the same questions, each with the model's template once: the same answers."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    register("lm_eval")
    arguments = {"pretrained": str(Path(demo.__file__).parent / "llava"), "dtype": "float32", "compress": "fastervlm"}
    found = lm_eval.simple_evaluate(
        model="hf-compress-multimodal",
        model_args={**arguments, "ratio": 0.9},
        tasks=["scenes"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        device="cpu",
        batch_size=8,
        limit=32,  # rendered twice, question 28 is answered otherwise
        bootstrap_iters=0,
        apply_chat_template=True,
        log_samples=True,
    )
    said = [sample["resps"][0][0].strip() for sample in found["samples"]["scenes"]]
    model, processor = demo.load_demo("llava", dtype="float32")
    processor.tokenizer.padding_side = "left"
    with model.compressed("fastervlm", ratio=0.9):
        assert said == answer(model, processor, load_scenes("test", images=8, questions=4), 8)


def test_lm_eval_itself():
    """Its evaluator on the embedded recall model: ratio 0 is its own `hf`, and recency alone forgets."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    register("lm_eval")
    register("lm_eval")
    folder = str(Path(demo.__file__).parent / "recall")

    def accuracy(model, **arguments):
        found = lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": folder, "dtype": "float32", **arguments},
            tasks=["recall"],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            device="cpu",
            batch_size=10,
            limit=20,
            bootstrap_iters=0,
        )
        return found["results"]["recall"]["exact_match,none"]

    full = accuracy("hf")
    assert full > 0.9
    assert accuracy("hf-compress", compress="streaming", ratio=0) == full
    assert accuracy("hf-compress", compress="streaming", ratio=0.9) < full / 2
