"""Labels of conversations: the answers and nothing else, whichever family reads them, padded on either side."""

import pytest
import torch

import hf_compress
from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate.prompts import tokenizer_of
from hf_compress.train import VisionTextCollator
from tests.evaluate.test_processors import PROCESSORS, picture, processor  # noqa: F401 - a fixture
from tests.tiny import build

TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color ?"}]},
    {"role": "model", "content": "red"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many ?"}]},
    {"role": "model", "content": [{"type": "text", "text": "green blue"}]},
]
ROWS = [{"messages": TALK, "images": [picture(0), picture(1, 40, 60)]}, {"messages": TALK[:2], "images": [picture(2)]}]
FAMILIES = [family for family in PROCESSORS if family != "paligemma"]  # of one prompt and one answer, see below
APART = [family for family in FAMILIES if family != "gemma3"]  # models that keep packed conversations apart


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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("processor", ["paligemma"], indirect=True)
def test_a_processor_that_takes_suffixes(processor, side):  # noqa: F811
    """Images, prompt, and behind a line break the answer with the end of the sequence, which alone are learnt."""
    processor.tokenizer.chat_template = None
    collate = VisionTextCollator(processor, answers="model", padding_side=side)
    rows = [
        {"messages": [dict(TALK[0], content="what color ?"), TALK[1]], "images": [picture(0), picture(1)]},
        {"messages": TALK[2:], "images": [picture(2)]},
    ]
    batch = collate(rows)
    ids, labels, real = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
    assert (ids == processor.image_token_id).sum(1).tolist() == [8, 4] and not bool(real.all())
    for row, said in enumerate(["red", "green blue"]):
        learnt = labels[row] != -100
        assert torch.equal(learnt, (batch["token_type_ids"][row] == 1) & real[row])
        assert processor.tokenizer.decode(ids[row][learnt]).split() == [*said.split(), "</s>"]
        alone = collate([rows[row]])
        assert torch.equal(alone["labels"][0], labels[row][real[row]])
    for wrong, images in ((TALK, 2), ([*TALK[:1], *TALK[:2]], 2), (TALK[:1], 1)):
        with pytest.raises(ValueError, match="takes a prompt and an answer"):
            collate([{"messages": wrong, "images": [picture(0)] * images}])


@pytest.mark.parametrize("processor", APART, indirect=True)
def test_packed_rows_are_the_rows_without_padding(processor, request):  # noqa: F811
    """Labels and positions too, whichever way a family counts them; no image is lost."""
    model = build(request.node.callspec.params["processor"])
    padded, packed = (VisionTextCollator(processor, answers="model", pack_for=m) for m in (None, model))
    batch, row, start = padded(ROWS), packed(ROWS), 0
    assert "attention_mask" not in row and not row["use_cache"]
    for i, one in enumerate(packed([example]) for example in ROWS):
        stop = start + one["input_ids"].shape[1]
        assert stop - start == int(batch["attention_mask"][i].sum())
        for key in ("input_ids", "labels", "position_ids"):
            assert torch.equal(row[key][..., start:stop], one[key]), key
        assert int(one["position_ids"].min()) == 0 and one["labels"][0, 0] == -100
        start = stop
    assert start == row["input_ids"].shape[1]
    pixels = {key for key in batch if key.startswith("pixel_values")}
    assert pixels and all(row[key].abs().sum() == batch[key].abs().sum() for key in pixels)


def test_conversations_that_a_model_would_mix_are_padded():
    """Of layers that keep a state it is known at once, of images that see themselves both ways once they are there."""
    with pytest.raises(ValueError, match="keep a state"):
        VisionTextCollator(hf_compress.load_demo("qwen")[1], pack_for=build("qwen3_5"))
    with pytest.raises(ValueError, match=r"pack_for=str: .* is not supported"):
        VisionTextCollator(hf_compress.load_demo("qwen")[1], pack_for="a model")


@pytest.mark.parametrize("processor", ["gemma3"], indirect=True)
def test_images_that_see_themselves_both_ways_are_not_packed(processor):  # noqa: F811
    model = build("gemma3")
    model.config.image_token_id = processor.tokenizer.image_token_id
    with pytest.raises(ValueError, match=r"both ways.*pad the conversations"):
        VisionTextCollator(processor, answers="model", pack_for=model)(ROWS)


def examples(questions=3):
    """Conversations of several turns, of which the first one is longer."""
    rows = load_scenes("test", images=3, questions=questions)
    for i in range(3):
        asked = rows[i * questions : (i + 1) * questions - i]
        pairs = zip(asked["question"], asked["answer"])
        turns = [{"role": r, "content": text} for pair in pairs for r, text in zip(("user", "assistant"), pair)]
        yield {"messages": turns, "images": asked["image"][:1]}


@pytest.mark.parametrize("kind", ["llava", "qwen"])
@pytest.mark.parametrize(
    ("method", "options"),
    [(None, {}), ("visionzip", {"ratio": 0.75}), ("fastv", {"ratio": 0.4, "layer": 1}), ("cdpruner", {"ratio": 0.5})],
)
def test_a_packed_batch_trains_as_a_padded_one(kind, method, options):
    """The loss of all labels and its gradient, padded left, right, and packed."""
    if method == "visionzip" and kind == "qwen":
        method = "divprune"
    model, reader = hf_compress.load_demo(kind)
    if method:
        model.compress(method, **options)
    model.train()
    found = []
    for setting in ({"padding_side": "left"}, {"padding_side": "right"}, {"pack_for": model}):
        model.zero_grad()
        loss = model(**VisionTextCollator(reader, **setting)(list(examples()))).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0], atol=1e-5, rtol=1e-5)
        for name, grad in found[0][1].items():
            torch.testing.assert_close(grads[name], grad, atol=1e-4, rtol=1e-3, msg=name)


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
