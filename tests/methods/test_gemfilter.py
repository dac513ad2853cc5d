"""gemfilter against the numbers of its card, and prompts shortened by products of queries and keys taken by hand."""

from types import SimpleNamespace

import pytest
import torch

from hf_compress import budget
from hf_compress.methods.prompt.gemfilter import GemFilter
from tests.invariants.language import FullLength
from tests.invariants.reference import alone, batch_of, close, greedy, logits_of, shared
from tests.invariants.test_prompt_stage import short
from tests.methods.test_promptdistill import pooled, products


def test_card():
    """z = 5 0 0 1 9 1: pooled 1.0 1.2 3.0 2.2 2.2 2.2; 2 3 4 stay."""
    text = SimpleNamespace(layers=32, attention=lambda layer, softmax: torch.tensor([[5.0, 0, 0, 1, 9, 1]]))
    assert GemFilter().assign(text, 3).kept.tolist() == [[2, 3, 4]]


def test_the_layer_that_chooses():
    assert [GemFilter().chooses(n) for n in (4, 28, 32, 40)] == [2, 11, 13, 16] and GemFilter(layer=0).chooses(4) == 0


@pytest.mark.parametrize("name", ["llama", "qwen2", "llava", "qwen2_5_vl"])
@torch.no_grad()
def test_the_prompt_is_read_anew(name):
    """Which tokens stay, from the bare model; and generation, prompt and steps, from the short prompt."""
    model, batch = shared(name), batch_of(name)
    with model.compressed("gemfilter", ratio=0.5, layer=1):
        run, last = greedy(model, batch), model.compression.last
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    z = products(name, full, [full.causal(i) for i in range(4)], 1)
    for b, kept in enumerate(last.layer_index[0]):
        shown = {i for image in full.images(b) for i in image}
        valid = batch["attention_mask"][b].nonzero()[:, 0].tolist()
        text = [i for i in valid if i not in shown][:-1]
        mine = pooled([float(z[b, valid[-1], i]) for i in text], 5)
        order = sorted(range(len(text)), key=lambda k: (-mine[k], k))
        stay = {text[k] for k in order[: budget.kept(len(text), 0.5)]}
        assert set(kept) == shown | stay | {valid[-1]}
    close(run.logits, short(name, batch, run.tokens, last.layer_index[0]))


@torch.no_grad()
def test_a_batch_is_its_samples():
    model = shared("llama")
    for side in ("left", "right"):
        batch = batch_of("llama", side=side)
        with model.compressed("gemfilter", ratio=0.5):
            together = logits_of(model, batch)
            for b, mask in enumerate(batch["attention_mask"].bool()):
                close(together[b, mask], logits_of(model, alone("llama", batch, b))[0])


@pytest.mark.parametrize("knobs", [dict(layer=-1), dict(pool=2), dict(keep_last=0), dict(keep_first=-1)])
def test_bad_knobs(knobs):
    with pytest.raises(ValueError, match=f"{next(iter(knobs))}="):
        GemFilter(**knobs)


def test_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match="has 4 layers"):
        shared("llama").compress("gemfilter", ratio=0.5, layer=9)
