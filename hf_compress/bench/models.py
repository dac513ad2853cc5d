"""What is timed: the demo model with its own inputs, a mid-size random LLaVA, and a tiny one for the tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import hf_compress


@dataclass
class Subject:
    """A model with a batch of prompts of one shape.

    Attributes:
        name: for tables.
        model: uncompressed, in eval mode.
        ids: (B, L) token ids, one placeholder per visual token, images at the same place in every row.
        pixels: what the vision tower takes, one image per row.
        image_token: the placeholder id.
    """

    name: str
    model: Any
    ids: Tensor
    pixels: Tensor
    image_token: int

    def twin(self) -> Any:
        """Another model object over the same parameters, so that one can be compressed beside the bare one."""
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return copy.deepcopy(self.model, shared)

    def prompt(self, model: Any, rows: Sequence[int] | None = None) -> dict[str, Any]:
        """Arguments of a prefill of `model`, the vision tower run beforehand.

        Args:
            rows: rows of the prompt to feed, ascending, as if it had never been longer; None: all of them.
        """
        features = model.base_model.get_image_features(pixel_values=self.pixels, return_dict=True)
        ids = self.ids if rows is None else self.ids[:, list(rows)]
        out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1}
        ready = copy.copy(features)
        if rows is not None:
            visual = (self.ids[0] == self.image_token).cumsum(0) - 1
            at = visual[list(rows)][ids[0] == self.image_token]
            ready.pooler_output = [image[at] for image in features.pooler_output]
        if (ids == self.image_token).any():
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
    return Subject("demo", model, batch["input_ids"], batch["pixel_values"], model.config.image_token_id)


def mid() -> Subject:
    """Random weights in the shape of a small language model: hidden size 1024, 8 layers, 576 visual and 64 text tokens.

    16 heads of 64, 4 KV heads, gated MLP of 2816, vocabulary 1000; the tower is small, being outside of the timing.
    """
    text = dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4
    )
    return _random("mid", side=24, words=64, vocabulary=1000, tower=(128, 4), **text)


def tiny() -> Subject:
    """Random, hidden size 32, 4 layers, 36 visual and 10 text tokens: for tests."""
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    return _random("tiny", side=6, words=10, vocabulary=100, tower=(16, 2), **text)


def _random(name: str, side: int, words: int, vocabulary: int, tower: tuple[int, int], **text: int) -> Subject:
    """A LLaVA with side x side visual tokens, then `words` text tokens; `tower`: its width and heads."""
    width, heads = tower
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=7,
        num_attention_heads=heads,
        image_size=8 * side,
        patch_size=8,
    )
    image = vocabulary - 1
    language = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=4096, pad_token_id=0, **text)
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_id=image, image_seq_length=side * side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = LlavaForConditionalGeneration(config).eval()
        pixels = torch.randn(1, 3, 8 * side, 8 * side)
        ids = torch.randint(3, image, (1, words))
    half = words // 2
    placeholders = torch.full((1, side * side), image)
    return Subject(name, model, torch.cat([ids[:, :half], placeholders, ids[:, half:]], 1), pixels, image)


SUBJECTS: dict[str, Callable[[], Subject]] = {"demo": demo, "mid": mid, "tiny": tiny}
