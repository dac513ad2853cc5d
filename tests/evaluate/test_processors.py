"""Prompts by the processors of the supported families, none of which agree on how images are handed over."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from transformers.models.smolvlm import processing_smolvlm as smolvlm

import hf_compress
from hf_compress.evaluate.prompts import encode, encode_rows, question_tokens, tokenizer_of

SIDE = 28
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}{{ 'MARK' if c['type'] == 'image' else "
    "c['text'] }}{% endfor %}{% endfor %}{% if add_generation_prompt %}[model]{% endif %}"
)
QUESTIONS = ["what color ?", "how many ?"]


def tokenizer(*tokens, **named):
    """That of the embedded LLaVA, which reads by words, with the marks of a family."""
    found = hf_compress.load_demo("llava")[1].tokenizer
    found.padding_side = "left"
    found.add_special_tokens({"additional_special_tokens": [*tokens, *named.values()]})
    for name, token in named.items():
        setattr(found, name, token)
        setattr(found, f"{name}_id", found.convert_tokens_to_ids(token))
    return found


def pixels(kind, side=SIDE, **options):
    return getattr(T, f"{kind}ImageProcessorPil")(size={"height": side, "width": side}, **options)


SHORT = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
ANYRES = {**SHORT, "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]}
QWEN = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}
TILED = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
QWEN_MARKS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
IDEFICS_MARKS = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")


def idefics(kind):
    images = getattr(T, f"{kind}ImageProcessorPil")(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    return images, tokenizer(*IDEFICS_MARKS, image_token="<image>")


def gemma3():
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return T.Gemma3Processor(pixels("Gemma3"), tokenizer(**marks), image_seq_length=4)


def paligemma():
    images = pixels("Siglip")
    images.image_seq_length = 4
    return T.PaliGemmaProcessor(images, tokenizer("<image>"))


def qwen(kind):
    return getattr(T, f"{kind}Processor")(T.Qwen2VLImageProcessorPil(**QWEN), tokenizer(**QWEN_MARKS))


def internvl():
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return T.InternVLProcessor(
        pixels("GotOcr2", **TILED), tokenizer(**marks, video_token="<video>"), image_seq_length=4
    )


def aya():
    marks = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"]
    marks += [f"TILE_{i}" for i in range(1, 5)]
    return T.AyaVisionProcessor(
        pixels("GotOcr2", **TILED), tokenizer(*marks, image_token="<image>"), patch_size=14, img_size=SIDE
    )


def cohere():
    marks = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "img_line_break_token": "<|BREAK|>"}
    return T.Cohere2VisionProcessor(
        T.Cohere2VisionImageProcessor(size={"height": SIDE, "width": SIDE}, **TILED),
        tokenizer(**marks, image_token="<|IMG_PATCH|>"),
    )


def pixtral():
    images = T.PixtralImageProcessorPil(size={"longest_edge": 2 * SIDE}, patch_size=14)
    return T.PixtralProcessor(images, tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]"), patch_size=14)


PROCESSORS = {
    "llava": lambda: T.LlavaProcessor(T.CLIPImageProcessorPil(**SHORT), tokenizer(), **LLAVA),
    "llava_next": lambda: T.LlavaNextProcessor(T.LlavaNextImageProcessorPil(**ANYRES), tokenizer(), **LLAVA),
    "llava_onevision": lambda: T.LlavaOnevisionProcessor(
        pixels("LlavaOnevision", image_grid_pinpoints=ANYRES["image_grid_pinpoints"]),
        tokenizer("<video>"),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    ),
    "video_llava": lambda: T.VideoLlavaProcessor(
        T.VideoLlavaImageProcessor(**SHORT), None, tokenizer("<video>"), patch_size=14
    ),
    "qwen2_vl": lambda: qwen("Qwen2VL"),
    "qwen2_5_vl": lambda: hf_compress.load_demo("qwen")[1],
    "qwen3_vl": lambda: qwen("Qwen3VL"),
    "glm4v": lambda: T.Glm4vProcessor(
        T.Glm4vImageProcessorPil(**QWEN), tokenizer(image_token="<|image|>", video_token="<|video|>")
    ),
    "internvl": internvl,
    "idefics3": lambda: T.Idefics3Processor(*idefics("Idefics3"), image_seq_len=4),
    "smolvlm": lambda: T.SmolVLMProcessor(*idefics("SmolVLM"), SimpleNamespace(num_frames=1, fps=1), image_seq_len=4),
    "gemma3": gemma3,
    "paligemma": paligemma,
    "aya_vision": aya,
    "cohere2_vision": cohere,
    "mistral3": pixtral,
}


@pytest.fixture
def processor(request, monkeypatch):
    """Of a family; without the part for videos, which needs torchvision."""
    family = request.param
    monkeypatch.setattr(T.ProcessorMixin, "check_argument_for_proper_class", lambda *args: None)
    monkeypatch.setattr(smolvlm, "num2words", lambda number: str(number), raising=False)  # of frames
    try:
        found = PROCESSORS[family]()
    except ImportError as error:
        pytest.skip(f"cannot be built here: {error}")
    if family not in ("paligemma", "qwen2_5_vl"):  # the one has no template, the other its own
        found.chat_template = TEMPLATE.replace("MARK", found.image_token)
    return found


def picture(seed, width=60, height=40):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


ROWS = [[picture(0), picture(1, 40, 60)], picture(2)]  # two images, and one


def visual(processor, inputs):
    """Per row: tokens that stand for images."""
    marks = torch.tensor(
        [t for t in getattr(processor, "image_token_ids", [processor.image_token_id]) if t is not None]
    )
    return torch.isin(inputs["input_ids"], marks).sum(1).tolist()


@pytest.mark.parametrize("processor", PROCESSORS, indirect=True)
def test_rows_with_different_numbers_of_images(processor):
    """Together what each gives alone, called as its documentation says: the images of a row with the row."""
    together = encode(processor, ROWS, QUESTIONS)
    alone = [encode(processor, [about], [question]) for about, question in zip(ROWS, QUESTIONS)]
    for i, one in enumerate(alone):
        row = together["input_ids"][i][together["attention_mask"][i].bool()]
        assert torch.equal(row, one["input_ids"][0])
    assert "labels" not in together
    counts = visual(processor, together)
    assert counts == [visual(processor, one)[0] for one in alone] and all(counts)
    key = next(key for key in together if key.startswith("pixel_values"))
    pixels, parts = together[key], [one[key] for one in alone]
    assert len(pixels) in (sum(map(len, parts)), len(ROWS))
    if len(pixels) == len(ROWS):  # one list per row: what a row lacks is padding at the end
        assert all(torch.equal(pixels[i][: part.shape[1]], part[0]) for i, part in enumerate(parts))
    elif len({part.shape[1:] for part in (pixels, *parts)}) == 1:
        assert torch.equal(pixels, torch.cat(parts))


@pytest.mark.parametrize("processor", PROCESSORS, indirect=True)
def test_two_turns_are_one_prompt_cut(processor):
    """Not a token more or less, the question and all that follows it in the second turn, the images in the first."""
    questions = ["what color ?", "how many ?"]
    whole = encode(processor, ROWS, questions)
    for row in (0, 1):
        batch = encode_rows(processor, [row], [questions[row]], [ROWS[row]], "two-turn")
        one = encode(processor, [ROWS[row]], [questions[row]])
        assert torch.equal(torch.cat([batch.inputs["input_ids"], batch.later], 1), one["input_ids"])
        assert visual(processor, batch.inputs) == [visual(processor, whole)[row]]
        said = tokenizer_of(processor).decode(batch.later[0], skip_special_tokens=True)
        before = tokenizer_of(processor).decode(batch.inputs["input_ids"][0], skip_special_tokens=True)
        assert questions[row].split()[0] in said and questions[row].split()[0] not in before
        assert all(v.shape[1] == batch.inputs["input_ids"].shape[1] for k, v in batch.inputs.items() if "mask" in k[:9])
    if not isinstance(processor, T.PaliGemmaProcessor):  # which adds tokens by itself, as many to every row
        lengths = question_tokens(processor, questions, ROWS)
        assert lengths == [
            encode_rows(processor, [0], [q], [a], "two-turn").later.shape[1] for q, a in zip(questions, ROWS)
        ]
