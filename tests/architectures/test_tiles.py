"""Families whose tiles come as images of their own: those of a picture share its budget, as the crops of AnyRes do."""

import pytest
import torch

from tests import tiny
from tests.invariants.reference import batch_of, close, logits_of, shared
from tests.tiny import IMG

# Prompts as the processors write them, IMG for a tile; 50 and up are tokens that only processors write.
OPEN, CLOSE, FAKE, GLOBAL, ROW, BREAK = 50, 51, 52, 53, 54, 13
INTERNVL = [1, OPEN, IMG, IMG, IMG, CLOSE, 5, OPEN, IMG, CLOSE, 7, 8]
AYA = [1, OPEN, ROW, IMG, ROW + 1, IMG, GLOBAL, IMG, CLOSE, OPEN, GLOBAL, IMG, CLOSE, 7, 8]
COMMAND_A = [1, OPEN, IMG, BREAK, IMG, BREAK, IMG, BREAK, CLOSE, OPEN, IMG, BREAK, CLOSE, 7, 8]
SPLIT = [FAKE, ROW, IMG, FAKE, ROW + 1, IMG, BREAK, BREAK, FAKE, GLOBAL, IMG, FAKE]
WHOLE = [FAKE, GLOBAL, IMG, FAKE]
IDEFICS = [1, *SPLIT, *WHOLE, 7, 8]
PROMPTS = {
    "internvl": INTERNVL,
    "aya_vision": AYA,
    "cohere2_vision": COMMAND_A,
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
}


def tiled(name, prompts):
    """A batch without the delimiters of tests/tiny: the prompts bring their own."""
    return tiny.batch(name, shared(name), prompts, delimiters=False)


@pytest.mark.parametrize("name", PROMPTS)
def test_keep_counts_tokens_of_a_picture(name):
    """Three tiles and one: so many tokens of each picture, evenly over tiles, however many tiles it has."""
    model, batch = shared(name), tiled(name, [PROMPTS[name]])
    tokens = int((batch["input_ids"] == IMG).sum()) // 4
    for keep in (tokens - 1, tokens + 1, 2 * tokens):
        with model.compressed("uniform", keep=keep):
            logits_of(model, batch)
            last = model.compression.last
        assert last.visual_tokens == [[3 * tokens, tokens]]
        assert last.visual_left == [[keep, min(keep, tokens)]]
        in_tiles = torch.tensor(last.visual_kept[0][0]).div(tokens, rounding_mode="floor").bincount(minlength=3)
        assert in_tiles.sum() == keep and in_tiles.max() - in_tiles.min() <= 1


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("method", ["fastervlm", "divprune", "tome", "random"])
def test_a_batch_of_tiled_pictures_is_one_by_one(name, method):
    """Pictures of other samples, with other numbers of tiles, change nothing."""
    model, prompt = shared(name), PROMPTS[name]
    batch = tiled(name, [[1, 5, *prompt[1:]], [*prompt[:-2], 9]] if name not in tiny.PER_ROW else [prompt, prompt])
    valid = batch["attention_mask"].bool()
    with model.compressed(method, ratio=0.5):
        together, kept = logits_of(model, batch), model.compression.last.visual_kept
        for row in range(2):
            sample = tiny.single(batch, row, name)
            close(logits_of(model, sample)[0], together[row, valid[row]])
            assert model.compression.last.visual_kept == [kept[row]]


@pytest.mark.parametrize("name", PROMPTS)
def test_pictures_with_text_between_them(name):
    """They are not taken for tiles of one."""
    model, batch = shared(name), batch_of(name, "equal")
    with model.compressed("uniform", ratio=0.5):
        logits_of(model, batch)
        pictures = len(model.compression.last.visual_tokens[0])
    assert pictures == 2


@pytest.mark.parametrize("name", PROMPTS)
def test_layer_averaged_tokens_of_a_picture(name):
    """The decoder stage counts pictures too."""
    model, batch = shared(name), tiled(name, [PROMPTS[name]])
    tokens = int((batch["input_ids"] == IMG).sum()) // 4
    with model.compressed("fastv", keep=tokens, layer=1):
        logits_of(model, batch)
        layers = model.compression.last.layer_index
    visual = batch["input_ids"][0] == IMG
    mean = sum(int(visual[rows[0]].sum()) for rows in layers) / len(layers)
    assert abs(mean - 2 * tokens) <= 1
