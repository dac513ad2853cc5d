"""The template of the model is applied once; two turns are the tokens of one prompt, cut where the question starts."""

from contextlib import nullcontext

import pytest
import torch
import transformers as T
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import hf_compress
from hf_compress.evaluate import sweep
from hf_compress.evaluate.judge import Sweep
from hf_compress.evaluate.prompts import encode, encode_rows, question_tokens, render, reply
from hf_compress.evaluate.tasks import load_task

PLAIN = "{{ bos_token }}{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}<assistant>"
TRIMMED = PLAIN.replace("m['content']", "m['content'] | trim")
QUESTIONS = ["what is it ?", "a", "s", "<user>", "  who ?  ", "the story", "0", "what\nnow ?", "ünïcode ?"]
CONTEXT = "the story of what was, and who ? what is it ? "


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer whose tokens run across words, lines and marks, as nothing splits the text before it."""
    bare = Tokenizer(models.BPE(unk_token=None))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    text = [f"<user>{CONTEXT}\n{q}<end><assistant>" for q in QUESTIONS] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bare.train_from_iterator(text, trainer)
    return T.PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="left"
    )


@pytest.mark.parametrize("template", [PLAIN, TRIMMED, None])
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_cut_is_before_the_question(pieces, template, question):
    """Even where the question also stands in the text, in the template, or in one token with what is before it."""
    pieces.chat_template = template
    batch = encode_rows(pieces, [0], [question], [CONTEXT], "two-turn")
    whole = encode(pieces, [CONTEXT], [question])["input_ids"]
    assert torch.equal(torch.cat([batch.inputs["input_ids"], batch.later], 1), whole)
    first, later = pieces.decode(batch.inputs["input_ids"][0]), pieces.decode(batch.later[0])
    head = {PLAIN: f"<s><user>{CONTEXT}\n", TRIMMED: f"<s><user>{CONTEXT}\n", None: f"{CONTEXT} "}[template]
    tail = question.rstrip() if template == TRIMMED else question
    tail += "" if template is None else "<end><assistant>"
    assert head.startswith(first) and later.endswith(tail) and first + later == head + tail
    span = pieces.convert_ids_to_tokens(int(batch.later[0, 0]))
    assert len(head) - len(first) < len(span)  # at most what one token has of both
    assert question_tokens(pieces, [question], [CONTEXT]) == [batch.later.shape[1]]


def test_the_template_of_a_tokenizer_writes_all_marks(pieces):
    """As `apply_chat_template` does; a tokenizer that adds marks of its own would add them once more."""
    pieces.chat_template = "<user>{{ messages[0]['content'] }}<assistant>"
    from tokenizers.processors import TemplateProcessing

    old = pieces.backend_tokenizer.post_processor
    pieces.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", pieces.bos_token_id)])
    try:
        turn = [{"role": "user", "content": f"{CONTEXT}\nwho ?"}]
        expected = pieces.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        assert torch.equal(encode(pieces, [CONTEXT], ["who ?"])["input_ids"], expected["input_ids"])
        pieces.chat_template = None  # a base model: the marks are the tokenizer's
        assert encode(pieces, [CONTEXT], ["who ?"])["input_ids"][0, 0] == pieces.bos_token_id
    finally:
        pieces.backend_tokenizer.post_processor = old


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_prompts_are_those_of_the_processor(name):
    """Rendered, expanded and encoded as `apply_chat_template` does it, once."""
    processor = hf_compress.load_demo(name)[1]
    processor.tokenizer.padding_side = "left"
    shown = [Image.new("RGB", (64, 64), "red"), [Image.new("RGB", (64, 64), c) for c in ("blue", "green")]]
    turns = [
        [{"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": q}]}]
        for images, q in zip((shown[:1], shown[1]), ("what color ?", "how many ?"))
    ]
    expected = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )  # fmt: skip
    found = encode(processor, shown, ["what color ?", "how many ?"])
    assert all(torch.equal(found[key], expected[key]) for key in ("input_ids", "attention_mask", "pixel_values"))


def test_rows_of_different_numbers_of_images_are_answered_as_alone(demo):
    """Compressed and not, in both protocols."""
    model, processor = demo
    task = load_task("demo:scenes", 8)
    shown = [task.shown([0])[0], task.shown([0, 4])]
    questions = ["what digit is at the top left ?", "what digit is at the top right ?"]
    rows = [(i, [q], [s]) for i, (q, s) in enumerate(zip(questions, shown))]
    keys = ("answer", "length", "cut", "visual", "entries")
    for protocol in ("one-turn", "two-turn"):
        for change in (nullcontext(), model.compressed("divprune", ratio=0.5)):
            with change:
                alone = [reply(model, processor, encode_rows(processor, [i], *row, protocol))[0] for i, *row in rows]
                both = reply(model, processor, encode_rows(processor, [0, 1], questions, shown, protocol))
            assert [[r[k] for k in keys] for r in both] == [[r[k] for k in keys] for r in alone]
            assert both[1]["visual"] == 2 * both[0]["visual"] > 0


def test_batches_of_two_turns_feed_alike(tmp_path):
    """Questions of many lengths, white space around them, a template that trims: the bare model answers as in one."""
    model, tokenizer = hf_compress.load_demo("recall")
    tokenizer.chat_template = "{{ messages[0]['content'] | trim }}"
    task = load_task("demo:recall", 12)
    task.questions = [f"{'  ' * (i % 2)}{q}{' ' * (i % 3)}" for i, q in enumerate(task.questions)]
    judge = Sweep(model, tokenizer, task, [], None, "two-turn", 4, 3)
    batches = [rows for chunk in judge.chunks() for rows in chunk]
    assert sorted(row for rows in batches for row in rows) == list(range(12)) and max(map(len, batches)) > 1
    found = {}
    for protocol in ("one-turn", "two-turn"):
        results = sweep(
            model, task, "streaming", [0.5], processor=tokenizer, out=tmp_path / protocol, protocol=protocol,
            batch_size=4, timed=False, progress=False,
        )  # fmt: skip
        found[protocol] = results.rows[0].accuracy[0]
    assert found["one-turn"] == found["two-turn"] == 1


def test_prompts_that_cannot_be_made(demo, pieces):
    processor = demo[1]
    image, template = Image.new("RGB", (112, 112)), processor.chat_template
    try:
        processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"  # of the language model alone
        with pytest.raises(ValueError, match=r"writes 0 marks '<image>' for 1 images"):
            render(processor, "what ?", image)
        processor.chat_template = "USER: {{ messages[0]['content'][-1]['text'] }} <image>"
        assert encode_rows(processor, [0], ["what ?"], [image]).later is None
        with pytest.raises(ValueError, match="shows the image after the question; choose protocol='one-turn'"):
            encode_rows(processor, [0], ["what ?"], [image], "two-turn")
    finally:
        processor.chat_template = template
    pieces.chat_template = "<user>"
    with pytest.raises(ValueError, match=r"does not show the question 'who \?'"):
        encode_rows(pieces, [0], ["who ?"], [CONTEXT], "two-turn")
    pieces.chat_template = PLAIN
    with pytest.raises(ValueError, match=r"questions of rows \[3, 5\] take \[\d+, \d+\] tokens"):
        encode_rows(pieces, [3, 5], ["who ?", "what is it, and who was it ?"], [CONTEXT] * 2, "two-turn")
    slow = T.ByT5Tokenizer(padding_side="left")
    with pytest.raises(ValueError, match=r"does not say where its tokens stand.*one-turn"):
        encode_rows(slow, [0], ["who ?"], [CONTEXT], "two-turn")
