"""The model: an ordinary `Qwen2_5_VLForConditionalGeneration`, and the forward passes that training uses.

Training runs the modules of the model itself, in bf16, on images of one size at a time, with attention functions that
are fast on a CPU. `export.py` checks that both ways agree. Nothing of this is needed to use the exported checkpoint.
"""

from functools import partial

import torch
import torch.nn.functional as F
from attention import block_attention, softmax_attention
from processor import MERGE, PATCH, TOKEN, VIDEO, VISION_END, VISION_START, VOCABULARY
from render import PRESENT
from torch import nn
from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm, rotate_half
from vocabulary import BOS, EOS, IMAGE, PAD, USER

from hf_compress.demo.scenes import COLOR_NAMES, NAMES

WIDTH = 96  # of the vision tower
WINDOW = 4  # visual tokens per side of a window
PREFIX = (BOS, USER, VISION_START)  # before the visual tokens


def build_model():
    """A freshly initialised model of 3.3 M parameters: windowed tower, patch merger, Qwen2.5."""
    # Real checkpoints turn slowly, for long contexts. Positions here are below 40, and the last section of the
    # rotary embedding (columns) would hardly turn at all.
    vision = dict(
        depth=6,
        hidden_size=WIDTH,
        intermediate_size=256,
        num_heads=3,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=2,
        window_size=WINDOW * TOKEN,
        fullatt_block_indexes=[2, 5],
        out_hidden_size=192,
        rope_parameters=dict(rope_type="axial", rope_theta=100.0),
    )
    text = dict(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters=dict(rope_type="default", rope_theta=20.0, mrope_section=[6, 9, 9]),
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        weight = model.model.visual.patch_embed.proj.weight
        weight.normal_(0, weight[0].numel() ** -0.5)
        # so visual tokens have an rms near 1: what the layers of the language model add drowns smaller ones
        model.model.visual.merger.ln_q.weight.fill_(12.0)
    return model


class TowerHeads(nn.Module):
    """Linear read-outs of the tower, used by stage 1 only."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(MERGE**2 * WIDTH)
        self.token_class = nn.Linear(MERGE**2 * WIDTH, 1 + len(NAMES))
        self.token_color = nn.Linear(MERGE**2 * WIDTH, len(COLOR_NAMES))
        self.pooled_norm = nn.LayerNorm(WIDTH)
        self.present = nn.Linear(WIDTH, PRESENT)  # from what the last block's attention gathers, mean over patches


def use_training_functions(model):
    """Switches the language model to `block_attention` (`look` does its own) and all norms to `FastNorm`."""
    AttentionInterface.register("blocks", block_attention)
    model.model.language_model.config._attn_implementation = "blocks"
    for module in model.modules():
        if isinstance(module, Qwen2_5_VLRMSNorm):
            module.forward = partial(_norm, module)


def _norm(module, x):
    return FastNorm.apply(x, module.weight, module.variance_epsilon)


class FastNorm(torch.autograd.Function):
    """The RMS norm with its gradient, in bf16 but for the sum of squares: a sixth of a step less than by autograd."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square() / x.shape[-1] + epsilon).to(x.dtype)
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx, gradient):
        normed, scale, weight = ctx.saved_tensors
        of_weight = (gradient * normed).flatten(0, -2).sum(0)
        gradient = gradient * weight
        return (gradient - normed * (gradient * normed).mean(-1, keepdim=True)) * scale, of_weight, None


def look(model, images):
    """Runs the vision tower up to the merger.

    Args:
        images: (n, 3, height, width), normalised; both sides are multiples of 8.

    Returns:
        tokens (n, rows * columns, 4, 96): the patches of each visual token, row by row.
        gathered (n, 96): what the attention of the last block gathers, mean over the patches that gather. Each patch
            adds to it by the attention that it receives.
    """
    tower = model.model.visual
    n, height, width = len(images), images.shape[2] // PATCH, images.shape[3] // PATCH
    x = images.unflatten(2, (height, PATCH)).unflatten(4, (width, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    x = x @ tower.patch_embed.proj.weight.sum(2).flatten(1).mT  # both frames of a pair are the same picture
    rows, columns = torch.meshgrid(*(torch.arange(size, device=x.device) for size in (height, width)), indexing="ij")
    turns = tower.rotary_pos_emb(x, torch.stack([rows, columns], -1).flatten(0, 1))
    cos, sin = (turn.to(x.dtype).view(height, width, 1, -1) for turn in turns)
    for number, block in enumerate(tower.blocks):
        qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
        query, key, value = qkv.unbind(3)
        query, key = (t * cos + rotate_half(t) * sin for t in (query, key))
        attend = _everywhere if number in tower.fullatt_block_indexes else _in_windows
        gathered = attend(query, key, value, block.attn.scaling)
        x = x + block.attn.proj(gathered)
        x = x + block.mlp(block.norm2(x))
    x = x.unflatten(1, (-1, MERGE)).unflatten(3, (-1, MERGE)).transpose(2, 3)
    return x.reshape(n, -1, MERGE**2, WIDTH), gathered.mean((1, 2))


def _everywhere(query, key, value, scaling):
    """Attention of all patches to all; (n, rows, columns, heads, dim) to (n, rows, columns, heads * dim)."""
    flat = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    return softmax_attention(None, *flat, scaling=scaling)[0].reshape(*query.shape[:3], -1)


def _in_windows(query, key, value, scaling):
    """As `_everywhere` within windows of 8 x 8 patches; those at the right and at the bottom may be smaller."""
    side = WINDOW * MERGE
    rows, columns = query.shape[1:3]
    down, right = -rows % side, -columns % side

    def split(t):
        t = F.pad(t, (0, 0, 0, 0, 0, right, 0, down)) if down or right else t
        t = t.unflatten(1, (-1, side)).unflatten(3, (-1, side)).permute(0, 1, 3, 5, 2, 4, 6)
        return t.flatten(4, 5)  # (n, rows, columns of windows, heads, patches, dim)

    query, key, value = split(query), split(key), split(value)
    scores = (query * scaling) @ key.mT
    if down or right:
        inside = split(scores.new_ones(1, rows, columns, 1, 1))
        scores = scores + (inside.mT - 1) * 1e4
    mixed = (torch.softmax(scores, -1) @ value).unflatten(4, (side, side)).permute(0, 1, 4, 2, 5, 3, 6)
    return mixed.flatten(1, 2).flatten(2, 3)[:, :rows, :columns].flatten(3)


def answer(model, seen, order, grid, tokens):
    """Runs merger and language model on all questions about each image at once.

    Args:
        seen: (n, visual tokens, 4, 96), of `look`, those that the language model shall see.
        order: int64 (n, visual tokens): which they are of the rows * columns of the image, or of the frames * rows *
            columns of a clip; they keep those positions.
        grid: rows and columns, of any number of frames.
        tokens: int64 (n, questions, LENGTH).

    Returns:
        logits (n, questions, LENGTH, vocabulary).
    """
    language = model.model.language_model
    n, questions, length = tokens.shape
    start, end = (language.embed_tokens(tokens.new_tensor([ids])).expand(n, -1, -1) for ids in (PREFIX, [VISION_END]))
    visual = model.model.visual.merger(seen).view(n, order.shape[1], -1)
    states = torch.cat([start, visual, end, language.embed_tokens(tokens.flatten(1))], 1)
    prefix = len(PREFIX) + order.shape[1] + 1

    first, last = len(PREFIX), len(PREFIX) + max(grid)  # positions of the first visual token and of <|vision_end|>
    rows, columns = grid
    places = torch.stack([order // (rows * columns), order // columns % rows, order % columns]) + first
    counted = torch.arange(max(first, length), device=tokens.device)
    text = torch.cat([tokens.new_tensor([last]), last + 1 + counted[:length].repeat(questions)])
    positions = torch.cat([t.expand(3, n, -1) for t in (counted[:first], places, text)], -1)
    rotary = language.rotary_emb(states, positions)
    for layer in language.layers:
        states = layer(states, attention_mask=None, position_embeddings=rotary, prefix=prefix)
    return model.lm_head(language.norm(states[:, prefix:])).view(n, questions, length, -1)
