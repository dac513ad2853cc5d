"""What is timed: random weights in three architectures, the model that ships with the package, checkpoints."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import hf_compress
from hf_compress import registry
from hf_compress.engine.trained import pass_as_trained
from hf_compress.patches.registry import adapter_for

MID = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4)
WIDE = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


Sizes = dict[str, int]


@dataclass
class Subject:
    """A model with a batch of prompts of one shape.

    Attributes:
        name: for tables.
        model: uncompressed, in eval mode.
        ids: (B, L) token ids, one placeholder per visual token, images at the same place in every row.
        vision: arguments of `get_image_features`, one image per row; empty for a text model.
        image_token: the placeholder id, None of a text model.
        positions: (3, B, L) M-RoPE positions; None: consecutive ones.
    """

    name: str
    model: Any
    ids: Tensor
    vision: dict[str, Any] = field(default_factory=dict)
    image_token: int | None = None
    positions: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the prompts lie."""
        return self.ids.device

    @property
    def text(self) -> Any:
        """Config of the language model."""
        return self.model.config.get_text_config()

    @property
    def kv(self) -> tuple[int, int, int]:
        """Layers, KV heads and head size of the language model."""
        text = self.text
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return text.num_hidden_layers, heads, size

    @property
    def visual(self) -> Tensor:
        """(B, L) bool: the placeholders."""
        return self.ids.eq(-1 if self.image_token is None else self.image_token)

    def about(self) -> dict[str, Any]:
        """What a record has to say of it."""
        text, layers, heads, size = self.text, *self.kv
        sizes = {"hidden": text.hidden_size, "layers": layers, "heads": text.num_attention_heads, "kv_heads": heads}
        B, L = self.ids.shape
        visual = int(self.visual[0].sum())
        kind = {"type": self.model.config.model_type, "dtype": str(self.model.dtype).removeprefix("torch.")}
        return {"name": self.name, **kind, **sizes, "head_size": size, "batch": B, "tokens": L, "visual": visual}

    def twin(self) -> Any:
        """Another model object over the same parameters, so that one can be compressed beside the bare one."""
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, shared)

    def compressed(self, method: str, ratio: float) -> Any:
        """A twin compressed by "name", "name:knob=value,knob=value" or "name:weights=FOLDER" (by default new modules).

        Raises:
            ValueError: the method cannot do this on this model.
        """
        model = self.twin()
        name, _, options = method.partition(":")
        knobs: dict[str, Any] = {k: _value(v) for k, _, v in (x.partition("=") for x in options.split(",") if x)}
        if name == "razor" and not {"retrieval", "heads_file"} & set(knobs):
            layers, heads, _ = self.kv  # nobody has measured random weights: 15 % of the KV heads, as its paper says
            knobs["retrieval"] = [(i, h) for i in range(layers) for h in range(heads)][:: round(1 / 0.15)]
        model.compress(name, ratio=ratio, **knobs)
        pass_as_trained(model)
        return model

    def prompt(self, model: Any, rows: Sequence[int] | None = None) -> dict[str, Any]:
        """Arguments of a prefill of `model`, the vision tower run beforehand.

        Args:
            rows: rows of the prompt to feed, ascending, as if it had never been longer; None: all of them.
        """
        ids = self.ids if rows is None else self.ids[:, list(rows)]
        out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1}
        if not self.vision:
            return out
        if self.positions is not None:
            out["position_ids"] = self.positions if rows is None else self.positions[..., list(rows)]
            out |= {k: v for k, v in self.vision.items() if k == "image_grid_thw"}
        features = model.base_model.get_image_features(**self.vision, return_dict=True)
        ready = copy.copy(features)
        if rows is not None:
            place, stays = self.visual[0].cumsum(0) - 1, self.visual[0, list(rows)]
            at = place[list(rows)][stays]
            ready.pooler_output = [image[at] for image in features.pooler_output]
        if rows is None or bool(stays.any()):
            out["mm_encoder_outputs"] = {"image": ready}
        return out


def demo() -> Subject:
    """The trained model that ships with the package: hidden size 192, 6 layers, 196 visual tokens.

    A batch of 16 questions, as `hf-compress demo` asks them: alone, a prefill of this model takes a few milliseconds.
    """
    from PIL import Image

    from hf_compress.demo.dataset import prompt

    model, processor = hf_compress.load_demo("llava")
    noise = torch.randint(0, 256, (16, 112, 112, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    text = [prompt("what digit is at the top left ?")] * len(noise)
    batch = processor(images=[Image.fromarray(x.numpy()) for x in noise], text=text, return_tensors="pt")
    vision = {"pixel_values": batch["pixel_values"]}
    return Subject("demo", model, batch["input_ids"], vision, model.config.image_token_id)


def mid() -> Subject:
    """Random weights in the shape of a small language model: hidden size 1024, 8 layers, 576 visual and 64 text tokens.

    16 heads of 64, 4 KV heads, gated MLP of 2816, vocabulary 1000; the tower is small, being outside of the timing.
    """
    return llava("mid", 24, 64, 1000, (128, 4), MID)


def qwen() -> Subject:
    """The language model and the tokens of `mid` in a Qwen2.5-VL: M-RoPE, no [CLS], a windowed tower."""
    return qwen_vl("qwen", 24, 64, 1000, (128, 4), MID)


def text(length: int = 2048) -> Subject:
    """The language model of `mid` with 4 layers and no tower, and a prompt of `length` tokens."""
    return llama("text", length, 1000, dict(MID, num_hidden_layers=4))


def wide(length: int = 2048) -> Subject:
    """Two layers of LLaMA-7B (hidden size 4096, 32 heads of 128), and a prompt of `length` tokens: 1.6 GB in fp32.

    What grows with the square of the prompt alone, as scores of all rows do, is a far smaller part of these layers than
    of narrow ones: at 2048 tokens attention takes 5 % of a prefill here and 17 % on `text`.
    """
    return llama("wide", length, 1000, dict(WIDE, num_hidden_layers=2))


def slim(like: Subject) -> Subject:
    """A text model in bf16 with the cache and the prompt length of another model, and little else."""
    layers, heads, size = like.kv
    narrow = dict(hidden_size=128, intermediate_size=128, head_dim=size, num_hidden_layers=layers)
    narrow |= dict(num_attention_heads=like.text.num_attention_heads, num_key_value_heads=heads)
    return llama("slim", like.ids.shape[1], 100, narrow, torch.bfloat16)


def tiny() -> Subject:
    """Random, hidden size 32, 4 layers, 36 visual and 10 text tokens: for tests."""
    return llava("tiny", 6, 10, 100, (16, 2), TINY)


def tiny_qwen() -> Subject:
    """The same as a Qwen2.5-VL."""
    return qwen_vl("tiny_qwen", 6, 10, 100, (16, 2), TINY)


def tiny_text(length: int = 48) -> Subject:
    """The same as a text model."""
    return llama("tiny_text", length, 100, TINY)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def stage(method: str) -> str:
    """Stage of "name" or "name:knob=value"."""
    return registry.get(method.partition(":")[0]).stage


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def llama(name: str, length: int, words: int, sizes: Sizes, dtype: torch.dtype = torch.float32) -> Subject:
    config = LlamaConfig(vocab_size=words, max_position_embeddings=1 << 16, pad_token_id=0, **sizes)
    model = _seeded(lambda: LlamaForCausalLM(config).eval().to(dtype))
    return Subject(name, model, _ids(length, words))


def llava(name: str, side: int, words: int, vocabulary: int, tower: tuple[int, int], sizes: Sizes) -> Subject:
    """A LLaVA with side x side visual tokens between `words` text tokens; `tower`: its width and heads."""
    width, heads = tower
    sight = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=7, num_attention_heads=heads)
    vision = CLIPVisionConfig(**sight, image_size=8 * side, patch_size=8)
    image = vocabulary - 1
    language = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=1 << 16, pad_token_id=0, **sizes)
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_id=image, image_seq_length=side * side)
    model = _seeded(lambda: LlavaForConditionalGeneration(config).eval())
    pixels = _seeded(lambda: torch.randn(1, 3, 8 * side, 8 * side))
    return Subject(name, model, _between(words, side * side, image), {"pixel_values": pixels}, image)


def qwen_vl(
    name: str, side: int, words: int, vocabulary: int, tower: tuple[int, int], sizes: dict[str, int]
) -> Subject:
    """A Qwen2.5-VL with side x side visual tokens, each of 2 x 2 patches of 4 x 4 pixels."""
    width, heads = tower
    image, head = vocabulary - 1, sizes["hidden_size"] // sizes["num_attention_heads"]
    section = [head // 8, head // 8, head // 2 - 2 * (head // 8)]
    language = dict(
        vocab_size=vocabulary, max_position_embeddings=1 << 16, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    rope = dict(rope_type="default", mrope_section=section, rope_theta=1e4)
    sight = dict(depth=5, hidden_size=width, intermediate_size=4 * width, num_heads=heads)
    patches = dict(patch_size=4, spatial_merge_size=2, temporal_patch_size=2, window_size=16)
    config = Qwen2_5_VLConfig(
        vision_config=sight | patches | dict(out_hidden_size=sizes["hidden_size"], fullatt_block_indexes=[1, 2, 3, 4]),
        text_config=language | dict(rope_parameters=rope) | sizes,
        image_token_id=image,
        video_token_id=image - 1,
        vision_start_token_id=image - 2,
        vision_end_token_id=image - 3,
    )
    model = _seeded(lambda: Qwen2_5_VLForConditionalGeneration(config).eval())
    pixels = _seeded(lambda: torch.randn(4 * side * side, 3 * 2 * 4 * 4))
    grid = torch.tensor([[1, 2 * side, 2 * side]])
    return _placed(name, model, _between(words, side * side, image), {"pixel_values": pixels, "image_grid_thw": grid})


def _placed(name: str, model: Any, ids: Tensor, vision: dict[str, Any]) -> Subject:
    """With the M-RoPE positions that the model gives the prompt, where it has any."""
    image, positions = model.config.image_token_id, None
    if "image_grid_thw" in vision:
        kinds = (ids == image).int()
        positions, _ = model.base_model.get_rope_index(
            ids, image_grid_thw=vision["image_grid_thw"], mm_token_type_ids=kinds
        )
    return Subject(name, model, ids, vision, image, positions)


def _ids(length: int, vocabulary: int) -> Tensor:
    return _seeded(lambda: torch.randint(3, vocabulary - 4, (1, length)))


def _between(words: int, visual: int, image: int) -> Tensor:
    ids, half = _ids(words, image + 1), words // 2
    return torch.cat([ids[:, :half], torch.full((1, visual), image), ids[:, half:]], 1)


SUBJECTS: dict[str, Callable[..., Subject]] = {
    f.__name__: f for f in (demo, mid, qwen, text, wide, tiny, tiny_qwen, tiny_text)
}
TEXT = ("text", "wide", "tiny_text")  # of them take the length of their prompt


def load(name: str, *, device: str = "cpu", dtype: str | None = None, length: int | None = None) -> Subject:
    """One of `SUBJECTS`, or the checkpoint at a path or hub name with a prompt of random content.

    Args:
        dtype: as torch calls it; None: as it comes ("auto" of a checkpoint).
        length: tokens of the prompt of a text model; None: 2048 (48 of the tiny one).

    Raises:
        ValueError: no such device or dtype, a length for a subject that has its own, or a model that cannot be served.
    """
    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(kind, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is not a dtype of torch; pass float32, bfloat16 or float16")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch sees no CUDA device here; use device='cpu'")
    if name in SUBJECTS:
        if length is not None and name not in TEXT:
            raise ValueError(f"length={length}: {name!r} has a prompt of its own; {', '.join(TEXT)} take a length")
        subject = SUBJECTS[name]() if length is None else SUBJECTS[name](length)
    else:
        subject = checkpoint(name, kind, length or 2048)
    model = subject.model.to(device=device, dtype=kind)
    vision = {k: v.to(device) for k, v in subject.vision.items()}
    if "pixel_values" in vision:
        vision["pixel_values"] = vision["pixel_values"].to(model.dtype)
    places = None if subject.positions is None else subject.positions.to(device)
    return Subject(subject.name, model, subject.ids.to(device), vision, subject.image_token, places)


def checkpoint(path: str, dtype: torch.dtype | None, length: int) -> Subject:
    """A pretrained model: a text model reads random tokens, one with a tower a picture of noise and a short question.

    Raises:
        ValueError: the model is not served.
    """
    config = AutoConfig.from_pretrained(path)
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(path, dtype=dtype or "auto").eval()
    adapter_for(model)
    name = path.rstrip("/").rsplit("/", 1)[-1]
    if not sees:
        return Subject(name, model, _ids(length, len(AutoTokenizer.from_pretrained(path))))
    from PIL import Image

    processor = AutoProcessor.from_pretrained(path)
    noise = torch.randint(0, 256, (672, 672, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What does the picture show?"}]}]
    template = getattr(processor, "chat_template", None)
    said = processor.apply_chat_template(talk, add_generation_prompt=True) if template else processor.image_token
    batch = processor(images=Image.fromarray(noise.numpy()), text=said, return_tensors="pt")
    wanted = set(inspect.signature(model.base_model.get_image_features).parameters)
    return _placed(name, model, batch["input_ids"], {k: v for k, v in batch.items() if k in wanted})
