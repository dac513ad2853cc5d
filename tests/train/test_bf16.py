"""Losses in bf16: bit for bit those of a shortened row, and in a batch as near to fp64 as a batch shortened by hand.

The loss of n labelled rows is a function of their logits z whose gradient is g = (softmax(z) - target) / n. Errors of
the logits that are independent, of root mean square e, move it by a standard deviation of e * |g|. That e is measured
on the batch that is shortened by hand, against the same weights in fp64.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import build, single
from tests.train.test_steps import METHOD, RATIO, Kept, batches, losses, short_logits, trainer

BF16 = torch.bfloat16


def in_bf16(kind):
    """Under autocast, or with weights in bf16."""
    return torch.autocast("cpu", BF16, enabled=kind == "autocast")


def cast(batch, dtype):
    return batch | {"pixel_values": batch["pixel_values"].to(dtype)}


by_hand = torch.no_grad()(short_logits)


def models(kind):
    """The compressed model, the bare one, and the same weights in fp64."""
    compressed, bare = build("llava").compress(METHOD, ratio=RATIO).train(), build("llava").train()
    if kind == "weights":
        compressed, bare = compressed.to(BF16), bare.to(BF16)
    return compressed, bare, copy.deepcopy(bare).double()


def rms(x):
    return x.double().pow(2).mean().sqrt()


def deviation(exact, error, labels):
    """Of the mean loss, where logits have independent errors of this root mean square; all in fp64."""
    gradient = exact.softmax(-1) - F.one_hot(labels, exact.shape[-1])
    return error * gradient.norm() / len(labels)


@pytest.mark.parametrize("kind", ["autocast", "weights"])
@pytest.mark.parametrize("which", [0, 1], ids=["padded left", "padded right"])
def test_a_batch(kind, which):
    compressed, bare, double = models(kind)
    batch = cast(batches(bare)[which], compressed.dtype)
    with torch.no_grad(), in_bf16(kind):
        out = compressed(**batch)
        hand, labels = by_hand(bare, batch, compressed.compression.last.visual_kept)
    exact, _ = by_hand(double, cast(batch, torch.float64), compressed.compression.last.visual_kept)
    row, at = (batch["labels"] != -100).nonzero().unbind(1)
    rounding = rms(hand - exact)
    assert rounding > 1e-3 and rms(out.logits[row, at - 1] - exact) < 1.1 * rounding
    off = (out.loss.double() - F.cross_entropy(exact, labels)).abs()
    assert off < 3 * deviation(exact, rounding, labels)


@pytest.mark.parametrize("kind", ["autocast", "weights"])
@pytest.mark.parametrize("row", [0, 1])
def test_a_row_alone(kind, row):
    """The same products of the same shapes: nothing is rounded otherwise."""
    compressed, bare, _ = models(kind)
    batch = batches(bare)[0]
    labels = batch.pop("labels")[row : row + 1, batch["attention_mask"][row] == 1]
    one = cast(single(batch, row, "llava"), compressed.dtype) | {"labels": labels}
    with torch.no_grad(), in_bf16(kind):
        loss = compressed(**one).loss
        hand, wanted = by_hand(bare, one, compressed.compression.last.visual_kept)
    torch.testing.assert_close(loss, F.cross_entropy(hand.float(), wanted).to(loss), atol=0, rtol=0)


def test_a_step_of_trainer(tmp_path):
    """Of two micro batches; later steps depend on how gradients round."""
    model, kept = build("llava").compress(METHOD, ratio=RATIO), Kept()
    run = trainer(model, tmp_path, kept, max_steps=1, bf16=True)
    run.train()
    _, bare, double = models("autocast")
    data = {int((batch["labels"] != -100).sum()): batch for batch in batches(bare)}
    with in_bf16("autocast"):
        hand = torch.cat([by_hand(bare, data[n], kept)[0] for n, kept in kept.steps[0]])
    found = [by_hand(double, cast(data[n], torch.float64), kept) for n, kept in kept.steps[0]]
    exact, labels = torch.cat([z for z, _ in found]), torch.cat([t for _, t in found])
    off = abs(losses(run)[0] - float(F.cross_entropy(exact, labels)))
    assert 0 < off < 3 * float(deviation(exact, rms(hand - exact), labels))
