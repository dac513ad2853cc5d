"""The processor of the model: words of `tiny_llava`, marks of Qwen2.5-VL, images of any size.

Words have the ids that they have in `tiny_llava`, so rendered questions serve both models.
"""

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vocabulary import MEAN, SPECIAL, STD, WORDS, build_tokenizer

from hf_compress.demo.qwen_processor import ImageOnlyProcessor
from hf_compress.demo.scenes import SIZE

PATCH, MERGE = 4, 2  # pixels of a patch, patches of a visual token; per side
TOKEN = PATCH * MERGE  # pixels, side of a visual token
FEWEST, MOST = 8, SIZE // TOKEN  # visual tokens per side of a square image
HIDDEN = (*SPECIAL[:4], "<|image_pad|>")  # the id of llava's <image>
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
VOCABULARY = {word: number for number, word in enumerate((*HIDDEN, *SPECIAL[5:], *WORDS, *MARKS))}
VISION_START, VISION_END, VIDEO = (VOCABULARY[mark] for mark in MARKS)

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% else %} ASSISTANT: {% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build_processor():
    """The processor; an image of 112 x 112 pixels stands for 14 x 14 tokens, smaller ones for fewer, down to 64."""
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": (FEWEST * TOKEN) ** 2, "longest_edge": (MOST * TOKEN) ** 2},  # areas, in pixels
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    tokenizer = build_tokenizer(VOCABULARY, (*HIDDEN, *MARKS), SPECIAL[5:], names)
    return ImageOnlyProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)
