"""The model that training starts from: the demonstration Qwen2.5-VL with more words and a smaller MLP."""

import torch
from processor import CHAT_TEMPLATE as IMAGES_TEMPLATE
from processor import HIDDEN, MARKS
from processor import VOCABULARY as KNOWN
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from vocabulary import SPECIAL, build_tokenizer

from hf_compress.demo import load_demo
from hf_compress.demo.qwen_processor import ClipProcessor

NEW_WORDS = (
    *("after", "appear", "appears", "changes", "does", "end", "first", "it", "last", "move", "moves", "never"),
    *("object", "once", "only", "that", "vanishes"),
)
VOCABULARY = KNOWN | {word: len(KNOWN) + i for i, word in enumerate(NEW_WORDS)}
MLP = 384  # neurons of an MLP of the language model; 512 before
CHAT_TEMPLATE = IMAGES_TEMPLATE.replace(
    "<|vision_start|><|image_pad|><|vision_end|>\n{% else %}",
    "<|vision_start|><|image_pad|><|vision_end|>\n"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\n{% else %}",
)


def build_config(config):
    """The configuration, from that of the demonstration Qwen2.5-VL: one step of M-RoPE per moment of a second."""
    values = config.to_dict()
    values["text_config"] |= {"vocab_size": len(VOCABULARY), "intermediate_size": MLP}
    values["vision_config"] |= {"tokens_per_second": 1}
    return Qwen2_5_VLConfig(**values)


@torch.no_grad()
def build_model():
    """`Qwen2_5_VLForConditionalGeneration` of 3.0 M parameters, in fp32, that knows scenes but no clips.

    The new words start as the mean of the known ones and noise. Of every MLP those neurons go whose weights have the
    smallest product of norms. A pair of frames gives what their mean would give as an image.
    """
    known, _ = load_demo("qwen")
    model = Qwen2_5_VLForConditionalGeneration(build_config(known.config)).eval()
    state = known.state_dict()
    words = state["model.language_model.embed_tokens.weight"]
    more = words.mean(0) + 0.5 * words.std(0) * torch.randn(len(NEW_WORDS), words.shape[1])
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([words, more])
    for i in range(known.config.text_config.num_hidden_layers):
        mlp = f"model.language_model.layers.{i}.mlp"
        gate, up, down = (state[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        stays = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(MLP).indices.sort().values
        state |= {f"{mlp}.{part}_proj.weight": t[stays] for part, t in (("gate", gate), ("up", up))}
        state[f"{mlp}.down_proj.weight"] = down[:, stays]
    halves = state["model.visual.patch_embed.proj.weight"]
    state["model.visual.patch_embed.proj.weight"] = halves.mean(2, keepdim=True).expand_as(halves).clone()
    model.load_state_dict(state)
    return model


def build_processor():
    """The processor: images as before, and clips as lists of frames."""
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    tokenizer = build_tokenizer(VOCABULARY, (*HIDDEN, *MARKS), SPECIAL[5:], names)
    _, known = load_demo("qwen")
    return ClipProcessor(known.image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
