"""Names of the tiny models, and `build`."""

import math

import torch
import transformers as T

from tests.tiny.text import BOS, FURTHER, MAIN, PAD
from tests.tiny.vision import MODELS

FAMILIES = {
    "llava": ["llava", "llava_window", "video_llava"],
    "anyres": ["llava_next", "llava_next_video", "llava_onevision"],
    "qwen": ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"],
    "qwen3_5": ["qwen3_5", "qwen3_5_moe"],
    "lfm2": ["lfm2_vl"],
    "omni": ["qwen2_5_omni_thinker"],
    "glm": ["glm4v", "glm4v_moe", "glm46v", "glm_ocr"],
    "internvl": ["internvl"],
    "idefics3": ["idefics3", "smolvlm"],
    "gemma": ["gemma3", "paligemma"],
    "gemma4": ["gemma4"],
    "cohere": ["aya_vision", "cohere2_vision"],
    "pixtral": ["mistral3", "lighton_ocr"],
    "mllama": ["mllama"],
    "decoder_only": list(MAIN),
}
HYBRIDS = [*FAMILIES["qwen3_5"], *FAMILIES["lfm2"]]  # some layers keep a state in place of keys and values per token
VISION = ["llava", "qwen2_5_vl"]
DECODER_ONLY = ["llama", "mistral", "mistral_window", "qwen2", "qwen3"]
ARCHITECTURES = VISION + DECODER_ONLY
ALL_VISION = list(MODELS)
ALL_DECODER_ONLY = list(MAIN)
ALL_ARCHITECTURES = ALL_VISION + ALL_DECODER_ONLY
FURTHER_DECODER_ONLY = list(FURTHER)  # text models of the same build, for the adapter tests alone
VIDEO = [*FAMILIES["qwen"], *FAMILIES["qwen3_5"], *FAMILIES["omni"]]
VIDEO += ["llava_next_video", "llava_onevision", "video_llava"]


def build(name: str, attn: str = "sdpa") -> T.PreTrainedModel:
    """The model called `name` in float32 and eval mode: the same weights at every call.

    "gemma2" is eager whatever `attn` says, as transformers has no other attention for it.
    """
    config = (MODELS | MAIN | FURTHER)[name]()
    auto = T.AutoModelForImageTextToText if name in MODELS else T.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation="eager" if name == "gemma2" else attn).eval()
        _sharpen(model)
    # No end token: every row generates as many tokens as asked for.
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
    return model


@torch.no_grad()
def _sharpen(model: T.PreTrainedModel) -> None:
    """Scale the matrices so that attention is peaked and every layer matters.

    At the default scale a random model attends evenly and copies its last token: it gives one greedy output
    for every prompt, and a test of equal outputs would pass whatever a method does to the prompt.
    """
    text = model.config.get_text_config()
    scale = math.sqrt(text.hidden_size) if text.model_type.startswith("gemma") else 1.0  # Gemma multiplies by it
    blocks = ("visual.blocks.", "vision_tower.transformer.", "vision_encoder.transformer.")
    steep = text.model_type == "gemma4_text"  # nothing scales its logits, and every block multiplies
    gated = any("gate_proj" in key for key, _ in model.named_parameters() if any(part in key for part in blocks))
    for key, weight in model.named_parameters():
        if "gate" in key and weight.numel() == 1:
            weight.fill_(1.0)  # made as 0: images would have no effect (Mllama)
        if key.endswith("A_log"):
            weight.fill_(-2.0)  # made up to log(16): what the state of a layer holds would be gone after two tokens
        if key.endswith(("q_norm.weight", "k_norm.weight", "q_layernorm.weight", "k_layernorm.weight")):
            weight.add_(0.5 * torch.rand_like(weight))  # made as constant: all keys would have one norm
        if steep and key.endswith("q_norm.weight"):
            weight.mul_(0.5)
        if weight.ndim < 2:
            continue
        if not weight.std():
            weight.normal_()  # made as constant: projector of Gemma 3, places of InternVL and Gemma 4
        if "embed_tokens" in key:
            std = 1.0 / scale
        elif "position_embedding" in key or "pos_embed" in key:
            std = 1.0
        else:
            gain = 2.0 if any(part in key for part in ("q_proj", "k_proj", "qkv", "lm_head")) else 1.5
            if gated and any(part in key for part in blocks):
                gain = 1.0  # gated MLPs multiply: rounding errors of such a tower would grow tenfold
            elif gated and "merger" in key:
                gain = 2.5
            elif "expert" in key:
                gain = 1.0  # several of them are added
            elif "linear_attn" in key or (steep and any(part in key for part in ("vision_tower", "mlp", "per_layer"))):
                gain = 1.0  # gated too
            elif "language_model" in key and "self_attn.out_proj" in key:
                gain = 3.0  # LFM2: else its convolutions drown what attention says of farther rows
            inputs = weight.shape[-1] if "experts" in key else weight[0].numel()
            std = gain / math.sqrt(len(weight) if "mm_input_projection" in key else inputs)
        weight.mul_(std / weight.std())
