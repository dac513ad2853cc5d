"""Rollouts: what generate() has said is as probable in the forward that trains, with labels and without."""

import pytest
import torch

from tests import tiny
from tests.invariants.reference import VLMS, batch_of, cases, fresh, of_kind, on_output, options
from tests.tiny import BOS, GREEDY, IMG, build, inputs

TOKENS = 4
MODELS = [name for name in VLMS if name != "gemma4"]
FOLLOWING = {"fastv": {"layer": 1, "ratio": 0.4}, "cdpruner": {"ratio": 0.5}, "quecc": {"ratio": 0.5}}


def rollout(model, batch, **more):
    """(B, T) sampled tokens and their log-probabilities at every step of generate()."""
    torch.manual_seed(0)
    picks = {name: value for name, value in GREEDY.items() if name != "suppress_tokens"} | {"do_sample": True}
    picks |= {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "bad_words_ids": [[i] for i in range(80, 99)]}
    run = model.generate(**batch, **picks, **more, return_dict_in_generate=True, output_logits=True)
    new = run.sequences[:, batch["input_ids"].shape[1] :]
    return new, torch.stack(run.logits, 1).log_softmax(-1).gather(2, new[..., None])[..., 0]


def whole(name, batch, new):
    """Prompts padded on the left with their rollouts, as trainers of policies join them."""
    out = dict(batch)
    for key, behind in (("input_ids", new), ("attention_mask", torch.ones_like(new))):
        out[key] = torch.cat([batch[key], behind], 1)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in batch:
            out[key] = torch.cat([batch[key], torch.full_like(new, int(name == "paligemma"))], 1)
    return out


def scored(model, given, new, **more):
    """(B, T) log-probabilities of the rollouts from one forward in training mode."""
    logits = model.train()(**given, use_cache=False, **more).logits[:, -new.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(2, new[..., None])[..., 0]


def labels_of(batch, new):
    return torch.cat([torch.full_like(batch["input_ids"], -100), new], 1)


STAGES = [(stage, MODELS) for stage in ("vision", "passing", "decoder")] + [("prompt", None)]


@pytest.mark.parametrize(("method", "name"), [case for stage in STAGES for case in cases(*stage)])
def test_without_labels(method, name):
    """`logits_to_keep` says where the answers begin, as trainers of policies pass it."""
    model, batch = fresh(name), batch_of(name)
    model.compress(method, **options(method, model), **on_output(method)).train()
    with torch.no_grad():
        if method in of_kind("passing"):  # windows may hide what passes from the bare model, too
            model.compressor.vision.vector.normal_()
        new, said = rollout(model, batch)
    given = whole(name, batch, new)
    kept = scored(model, given, new, logits_to_keep=TOKENS + 1)
    assert kept.requires_grad
    torch.testing.assert_close(kept, said, atol=1e-4, rtol=0)
    torch.testing.assert_close(scored(model, given, new, labels=labels_of(batch, new)), said, atol=1e-4, rtol=0)
    model.decompress()
    assert (scored(model, given, new) - said).abs().max() > 1e-3


@pytest.mark.parametrize("method", FOLLOWING)
def test_a_step_that_does_not_say_where_the_prompt_ends_is_refused(method):
    """Without labels or `logits_to_keep` answers would decide too; the model is usable afterwards, and as it was."""
    model, batch = build("llava"), inputs("llava", build("llava"))
    model.compress(method, **FOLLOWING[method])
    with torch.no_grad():
        prompt = model.train()(**batch, logits_to_keep=1).logits  # all of it is the prompt
        with pytest.raises(ValueError, match=r"labels=None: .*logits_to_keep"):
            model(**batch)
        with pytest.raises(ValueError, match="labels=None"):
            model(**batch, logits_to_keep=torch.tensor([3, 4]))
        whole_rows = model.eval()(**batch).logits  # a prompt, as always
    torch.testing.assert_close(whole_rows[:, -1:], prompt, atol=1e-5, rtol=0)
    model.compression.set_budget(0)
    model.train()(**batch)  # nothing is decided


@pytest.mark.parametrize("method", ["visionzip", "divprune", "tome"])
def test_methods_that_do_not_ask_for_the_prompt_need_not_be_told(method):
    model, batch = build("llava").compress(method, ratio=0.4), inputs("llava", build("llava"))
    with torch.no_grad():
        new, said = rollout(model.train(), batch)
    torch.testing.assert_close(scored(model, whole("llava", batch, new), new), said, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", FOLLOWING)
def test_rollouts_that_end_at_other_places(method):
    """Behind its end of sequence a rollout is padded on the right, and goes into the next step with its group."""
    model = build("llava").compress(method, **FOLLOWING[method]).train()
    batch = tiny.batch("llava", model, [[BOS, 5, IMG, 7, 8, 9], [BOS, 11, 12, 13, 14, IMG, 15, 16, 17]])
    with torch.no_grad():
        new, said = rollout(model, batch, num_return_sequences=2)
    group = {k: v.repeat_interleave(2, 0) for k, v in batch.items()}
    given, real = whole("llava", group, new), torch.ones_like(new)
    real[0, 2:], real[3, 1:] = 0, 0
    given["attention_mask"][:, -TOKENS:] = real
    kept = scored(model, given, new, logits_to_keep=TOKENS + 1)
    torch.testing.assert_close(kept[real == 1], said[real == 1], atol=1e-4, rtol=0)


def test_a_smoothed_loss_is_not_taken_for_a_prompt(tmp_path):
    """`Trainer` takes the labels out of the batch then: silently every answer would have voted."""
    from transformers import Trainer, TrainingArguments

    def run(method, **options):
        model = build("llava").compress(method, **options)
        batch = inputs("llava", model)
        batch["labels"] = torch.where(batch["input_ids"] == IMG, -100, batch["input_ids"])
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, label_smoothing_factor=0.1, use_cpu=True, report_to="none", disable_tqdm=True
        )
        rows = [{k: v[0] for k, v in batch.items()}] * 8
        Trainer(model, arguments, train_dataset=rows, data_collator=lambda _: dict(batch)).train()

    with pytest.raises(ValueError, match=r"fastv.*label_smoothing_factor"):
        run("fastv", ratio=0.4, layer=1)
    with pytest.raises(ValueError, match=r"distill.*label_smoothing_factor"):
        run("visionzip", ratio=0.5, distill=0.5)
    run("visionzip", ratio=0.5)
