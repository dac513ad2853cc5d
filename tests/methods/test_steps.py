"""The second stage of DyCoke: what steps of decoding read, against masks made by hand."""

import pytest
import torch
import torch.nn.functional as F

from tests.invariants.reference import FullLength, batch_of, close, greedy, shared

STEPS = 6


def by_hand(full, visual, unread, layer, alike):
    """Masks of all layers, and how often a step keeps the choice of the one before.

    Args:
        visual: (B, prompt) bool.
    """
    see, held = [full.causal(i) for i in range(full.layers)], 0
    B, rows = full.valid.shape
    visual = F.pad(visual, (0, rows - visual.shape[1]))
    before, chosen = [None] * B, [None] * B
    for row in range(full.prompt, rows):
        attention = full.run(see)[1][layer - 1][:, :, row].mean(1)
        for b in range(B):
            at = visual[b].nonzero()[:, 0]
            looks = attention[b, at]
            if before[b] is None or F.cosine_similarity(looks, before[b], dim=0) < alike:
                count = max(1, int(len(at) * (1 - unread) + 1e-9))
                chosen[b] = at[looks.argsort(descending=True, stable=True)[:count]]
            else:
                held += 1
            before[b] = looks
            for i in range(layer, full.layers):
                see[i] = see[i].clone()
                hidden = visual[b].clone()
                hidden[chosen[b]] = False
                see[i][b, :, row] &= ~hidden
    return see, held


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("alike", [0.0, 0.9999, 1.0])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_against_masks_by_hand(name, alike, attn):
    """A padded batch of videos and images: what is not read at a step is as if it were not there."""
    model, batch = shared(name, attn), batch_of(name, "both")
    whole = greedy(model, batch, max_new_tokens=STEPS)
    with model.compressed("dycoke", 0, unread=0.6, unread_from=2, alike=alike):
        run = greedy(model, batch, max_new_tokens=STEPS)
    full = FullLength(name, batch, run.tokens)
    visual = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for b in range(len(visual)):
        visual[b, [i for image in full.visual(b) for i in image]] = True
    see, held = by_hand(full, visual, 0.6, 2, alike)
    close(run.logits, full.logits(see))
    assert held == (len(visual) * (STEPS - 2) if alike == 0 else held) and (alike < 1 or held == 0)
    assert torch.equal(run.logits[:, 0], whole.logits[:, 0]) and (run.logits - whole.logits).abs().max() > 1e-3
