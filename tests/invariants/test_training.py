"""Invariant 15: losses and gradients of the caller's labels are those of the short batch."""

import pytest
import torch

from tests import tiny
from tests.invariants.reference import (
    VLMS,
    FullLength,
    acts_inside_layers,
    alone,
    batch_of,
    cases,
    close,
    compressed,
    fresh,
    matrix,
    on_output,
    options,
    shared,
)
from tests.tiny import IMG


def labelled(batch):
    """Labels on the text of a batch; -100 on padding, on images and on first tokens, which nothing predicts."""
    mask = batch["attention_mask"]
    hidden = (batch["input_ids"] == IMG) | (mask == 0) | (mask.cumsum(1) == 1)
    return dict(batch, labels=batch["input_ids"].masked_fill(hidden, -100))


@pytest.mark.parametrize("side", ["left", "right"])
@matrix("dropping")
def test_loss_of_a_decoder_method(method, name, side):
    """Cross entropy over the survivors: each label is predicted by the last surviving row before it."""
    model, batch = shared(name), labelled(batch_of(name, side=side))
    with compressed(model, method), torch.no_grad():
        loss, last = model(**batch).loss, model.compression.last
    plain = {k: v for k, v in batch.items() if k != "labels"}
    full = FullLength(name, plain, batch["input_ids"][:, :1])
    close(loss, short_loss(full.run(full.survivors(last.layer_index))[0], batch["labels"], last.layer_index[-1]))


def short_loss(logits, labels, survivors):
    """Mean over the labels of all rows, after everything that did not survive is cut out."""
    losses = []
    for b, rows in enumerate(survivors):
        short, target = logits[b, rows], labels[b, rows]
        losses.append(torch.nn.functional.cross_entropy(short[:-1], target[1:], reduction="none", ignore_index=-100))
        losses[-1] = losses[-1][target[1:] != -100]
    return torch.cat(losses).mean()


@matrix("vision")
def test_loss_of_a_vision_method(method, name):
    """Equals, per sample, the loss over the rows that survive; both sides of padding give the same."""
    model, losses = shared(name), []
    for side in ("left", "right"):
        batch = labelled(batch_of(name, side=side))
        with compressed(model, method), torch.no_grad():
            out, last = model(**batch), model.compression.last
        losses.append(out.loss)
        close(out.loss, short_loss(out.logits, batch["labels"], last.layer_index[0]))
    close(losses[0], losses[1])


@pytest.mark.parametrize("reentrant", [False, True])
@matrix()
def test_gradients_and_checkpointing(method, name, reentrant):
    """Gradients reach the visual features and every decoder layer; checkpointing changes neither them nor the loss."""
    model, batch = fresh(name), labelled(batch_of(name))
    model.compress(method, **options(method, model), **on_output(method))  # inside the tower it is refused, see below
    model.train()
    plain = step(model, batch)
    if name == "gemma4" and reentrant:
        return  # keys that later layers read have no gradient then, on the bare model either: test_adapters.py
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    if acts_inside_layers(method):
        with pytest.raises(ValueError, match=f"gradient checkpointing: method='{method}'"):
            step(model, batch)
    else:
        checkpointed = step(model, batch)
        close(checkpointed[0], plain[0])
        for key, grad in plain[1].items():
            close(checkpointed[1][key], grad)
    assert all(any(f"layers.{i}." in key and grad.abs().sum() > 0 for key, grad in plain[1].items()) for i in range(4))
    if name in VLMS:
        parts = ("projector", "merger", "connector", "vision_projection", "embed_vision")
        tower = [grad for key, grad in plain[1].items() if any(part in key for part in parts)]
        assert tower and all(grad.abs().sum() > 0 for grad in tower if grad.ndim > 1)


def test_checkpointing_of_a_tower_that_merges_is_refused():
    """The blocks would be recomputed without the tokens of their run."""
    model, batch = fresh("llava"), labelled(batch_of("llava"))
    model.compress("tome", ratio=0.5)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="where='output'"):
        model(**batch)


def step(model, batch):
    """Loss and gradients of one training step."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@matrix("vision")
def test_labels_on_removed_rows_are_refused(method, name):
    """A label that would silently vanish raises; the model is usable afterwards."""
    model, batch = shared(name), batch_of(name)
    with compressed(model, method):
        with pytest.raises(ValueError, match="labels"):
            model(**batch, labels=batch["input_ids"])
        model(**labelled(batch))


@matrix("picking")
def test_labels_on_rows_that_layers_drop_are_refused(method, name):
    model, batch = shared(name), batch_of(name)
    with compressed(model, method), pytest.raises(ValueError, match="labels"):
        model(**batch, labels=batch["input_ids"])


@matrix("picking")
def test_no_answer_votes_on_what_it_may_read(method, name):
    """In training the kept rows depend on the prompt alone: changing the answer changes nothing."""
    model, kept = shared(name), []
    for answer in ([20, 21, 22], [70, 40, 33]):
        batch = tiny.batch(name, model, [[1, 5, IMG, 7, 8, *answer], [1, 11, IMG, IMG, 13, 14, *answer]])
        labels = batch["input_ids"].clone()
        labels[:, :-3] = -100
        if name == "paligemma":  # answers are the causal suffix
            batch["token_type_ids"][:, -3:] = 1
        with compressed(model, method), torch.no_grad():
            model(**batch, labels=labels)
            kept.append(model.compression.last.layer_index)
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("method", "name"), cases("vision") + cases("passing") + cases("decoder"))  # nothing cached
def test_samples_of_a_batch_train_as_alone(method, name):
    """The gradient of the summed loss of a padded batch is the sum of the gradients of its samples."""
    model, batch = fresh(name), labelled(batch_of(name))
    model.compress(method, **options(method, model))
    _, together = step(model, batch)
    counts, parts = [], []
    for row in range(2):
        sample = labelled(alone(name, batch, row))
        counts.append(int((sample["labels"][:, 1:] != -100).sum()))
        parts.append(step(model, sample)[1])
    for key, grad in together.items():
        pair = [p.get(key, torch.zeros_like(grad)) for p in parts]
        expected = (counts[0] * pair[0] + counts[1] * pair[1]) / sum(counts)
        torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-3)
