"""PruneVid inside the language model: what the question looks at most stays, in no cache is the rest."""

import pytest
import torch

from tests.invariants.reference import FullLength, batch_of, close, greedy, shared


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_rows_that_any_head_of_the_question_looks_at_most_stay(name, side):
    """The maximum over heads and over the text behind the videos, by the bare model's map of the layer before."""
    model, batch = shared(name), batch_of(name, "both", side=side)
    with model.compressed("prunevid_inner", 0.3, layer=2, truncate=False), torch.no_grad():
        model(**batch)
        last = model.compression.last
    full = FullLength(name, batch, batch["input_ids"][:, :1])
    attention = full.run([full.causal(i) for i in range(full.layers)])[1][1]
    real = batch["attention_mask"].bool()
    for b in range(len(real)):
        images = full.visual(b)
        every = [row for image in images for row in image]
        asks = [row for row in range(max(every) + 1, full.prompt) if real[b, row]]
        score = attention[b][:, asks].amax((0, 1))
        kept = set(last.layer_index[2][b]) & set(every)
        assert 0 < len(kept) < len(every)
        for image in images:
            mine = sorted(image, key=lambda row: (-float(score[row]), row))
            assert set(mine[: len(kept & set(image))]) == kept & set(image)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_what_goes_leaves_all_caches(name):
    """Prefill sees it up to the cut; steps of decoding see it in no layer."""
    model, batch = shared(name), batch_of(name, "video")
    with model.compressed("prunevid_inner", 0.3, layer=2):
        run, last = greedy(model, batch), model.compression.last
    full = FullLength(name, batch, run.tokens)
    late = torch.arange(full.rows)[:, None] >= full.prompt
    left = full.columns(last.layer_index[-1])[:, None, None]
    close(run.logits, full.logits([see & (left | ~late) for see in full.survivors(last.layer_index)]))


def test_a_wrong_knob_is_refused():
    with pytest.raises(ValueError, match="truncate='yes'"):
        shared("llava").compress("prunevid_inner", 0.3, layer=2, truncate="yes")
