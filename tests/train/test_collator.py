"""Labels of conversations: the answers and nothing else, whichever family reads them, padded on either side."""

import pytest
import torch

import hf_compress
from hf_compress.evaluate.prompts import tokenizer_of
from hf_compress.train import VisionTextCollator
from tests.evaluate.test_processors import PROCESSORS, picture, processor  # noqa: F401 - a fixture

TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color ?"}]},
    {"role": "model", "content": "red"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many ?"}]},
    {"role": "model", "content": [{"type": "text", "text": "green blue"}]},
]
ROWS = [{"messages": TALK, "images": [picture(0), picture(1, 40, 60)]}, {"messages": TALK[:2], "images": [picture(2)]}]
FAMILIES = [family for family in PROCESSORS if family != "paligemma"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("processor", FAMILIES, indirect=True)
def test_labels_are_the_answers(processor, side):  # noqa: F811
    """And the inputs of every row are those that the processor gives for it alone."""
    collate = VisionTextCollator(processor, answers="model", padding_side=side)
    batch = collate(ROWS)
    ids, labels, real = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
    assert bool(real[:, -1 if side == "left" else 0].all()) and not bool(real.all())
    tokenizer = tokenizer_of(processor)
    for row, said in enumerate(["redgreenblue", "red"]):
        learnt = labels[row] != -100
        assert torch.equal(labels[row][learnt], ids[row][learnt]) and not bool((learnt & ~real[row]).any())
        text = tokenizer.decode(labels[row][learnt], skip_special_tokens=True)
        for mark in ("model", "user", "[", "]", " ", "\n"):
            text = text.replace(mark, "")
        assert text == said
        alone = collate([ROWS[row]])
        assert torch.equal(alone["input_ids"][0], ids[row][real[row]])
        assert torch.equal(alone["labels"][0], labels[row][real[row]])


def example(*turns, images=()):
    return {"messages": [{"role": role, "content": content} for role, content in turns], "images": list(images)}


def test_what_is_wrong_is_named():
    found = hf_compress.load_demo("llava")[1]
    found.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else "
        "' ' + c['text'] }}{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    collate = VisionTextCollator(found)
    talk, image = [("user", "what color ?"), ("assistant", "red")], picture(0)
    assert (collate([example(*talk, images=[image])])["labels"] != -100).any()
    wrong = {
        "begin with an answer": example(*talk[1:], images=[image]),
        "nothing to learn": example(talk[0], images=[image]),
        "an example has 2, and its messages show 1": {**example(images=[image, image]), "messages": TALK[:2]},
        "must be a list of turns": {"messages": "what ?"},
    }
    with pytest.raises(ValueError, match=r"examples=\[\]"):
        collate([])
    for message, row in wrong.items():
        with pytest.raises(ValueError, match=message):
            collate([row])
    with pytest.raises(ValueError, match="answers= to the role"):
        VisionTextCollator(found, answers="model")([example(("user", "what ?"), ("model", "red"), images=[image])])
    with pytest.raises(ValueError, match="padding_side='up'"):
        VisionTextCollator(found, padding_side="up")
    found.chat_template = None
    found.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"set processor\.chat_template"):
        VisionTextCollator(found)
