"""The words of the model, their ids, and the tokenizer and processor made of them."""

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from hf_compress.demo.scenes import COLOR_NAMES, DIGITS, SHAPES, SIZE

PATCH = 8  # pixels, side of a patch
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
WORDS = (
    *("what", "which", "digit", "digits", "number", "shape", "shapes", "color", "is", "are", "at", "the", "of", "a"),
    *("has", "there", "where", "how", "many", "count", "read", "list", "all", "largest", "smallest", "objects"),
    *("nothing", "yes", "no", "?", ".", ",", "top", "middle", "bottom", "left", "center", "right"),
    *(*COLOR_NAMES, *SHAPES, *DIGITS),
)
VOCABULARY = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP, per channel, pixels in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% else %} ASSISTANT: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def encode(text, vocabulary=VOCABULARY):
    """Ids of words separated by blanks; KeyError for a word outside the vocabulary."""
    return [vocabulary[word] for word in text.split()]


def build_tokenizer(vocabulary=VOCABULARY, hidden=SPECIAL[:5], roles=SPECIAL[5:], names=None):
    """A word-level tokenizer; digits and punctuation are words of their own, batches are padded on the left.

    Args:
        vocabulary: word -> id; begins with the SPECIAL of this model or those of another.
        hidden: special tokens, which `skip_special_tokens` leaves out.
        roles: who speaks; ordinary tokens that swallow the blanks before them.
        names: further special tokens by the attribute that names them; of this model if None.
    """
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    words.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in hidden])
    words.add_tokens([AddedToken(word, normalized=False, lstrip=True) for word in roles])
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens=names or {"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )


def build_processor():
    """The `LlavaProcessor`: images of any size are cut to 112 x 112; one image stands for 196 tokens."""
    side = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=side, image_mean=list(MEAN), image_std=list(STD)
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # [CLS], which the model drops
        chat_template=CHAT_TEMPLATE,
    )
