"""The model: an ordinary `LlavaForConditionalGeneration`, and the forward passes that training uses.

Training runs the modules of the model itself, in bf16, with two attention functions that are fast on a CPU. Nothing
of this is needed to use the exported checkpoint.
"""

import torch
from attention import block_attention, softmax_attention
from render import PATCHES, PRESENT, SIDE
from torch import nn
from transformers import AttentionInterface, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from vocabulary import BOS, EOS, IMAGE, PAD, PATCH, USER, VOCABULARY

from hf_compress.demo.scenes import COLOR_NAMES, GRID, NAMES, SIZE

WIDTH = 128  # of the vision tower


def build_model():
    """A freshly initialised model of 3.7 M parameters: CLIP tower, MLP projector, LLaMA."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        rms_norm_eps=1e-5,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
        pad_token_id=PAD,
    )
    model = LlavaForConditionalGeneration(config)
    embeddings = model.model.vision_tower.embeddings
    with torch.no_grad():  # CLIP's own initial values are made for a width of 1024
        embeddings.position_embedding.weight.copy_(_sine_positions(WIDTH))
        embeddings.patch_embedding.weight.normal_(0, (3 * PATCH * PATCH) ** -0.5)
    return model


def _sine_positions(width, scale=0.5):
    """Sines and cosines of row and column, (1 + 196, width); the first row, of [CLS], is zero."""
    waves = torch.pi / SIDE * torch.linspace(1, SIDE / 2, width // 4)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    y, x = rows.reshape(-1, 1) * waves, columns.reshape(-1, 1) * waves
    return torch.cat([torch.zeros(1, width), torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], 1)]) * scale


def amplify(tower, gain=16.0):
    """Makes the features of a trained tower `gain` times larger and changes nothing else.

    Every layer normalises what it reads from the residual stream, so only the stream's own scale changes. Features
    of an rms near 1.6 become visual tokens of 0.05 in a new projector, and what the layers of the language model add
    soon drowns them: it then hardly learns to look up the color or the place of an object. An rms near 25 lasts
    through all layers.

    Args:
        tower: weights of the tower by their name in the model.
        gain: a power of two changes no rounding.

    Returns:
        the new weights, same names.
    """
    writers = ("pre_layrnorm", "out_proj", "fc2")  # all that writes to the stream
    return {name: w * gain if any(writer in name for writer in writers) else w for name, w in tower.items()}


class TowerHeads(nn.Module):
    """Linear read-outs of the tower, used by stage 1 only."""

    def __init__(self):
        super().__init__()
        self.patch_norm, self.cls_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.patch_class = nn.Linear(WIDTH, 1 + len(NAMES))
        self.patch_color = nn.Linear(WIDTH, len(COLOR_NAMES))
        self.patch_cell = nn.Linear(WIDTH, GRID * GRID)
        self.present_last = nn.Linear(WIDTH, PRESENT)  # from [CLS] of the last layer
        self.present_used = nn.Linear(WIDTH, PRESENT)  # from [CLS] of the layer whose patches the LM sees


def use_training_attention(model):
    """Switches the tower to `softmax_attention` and the language model to `block_attention`."""
    AttentionInterface.register("softmax", softmax_attention)
    AttentionInterface.register("blocks", block_attention)
    model.model.vision_tower.config._attn_implementation = "softmax"
    model.model.language_model.config._attn_implementation = "blocks"


def look(model, images):
    """Runs the vision tower.

    Args:
        images: (n, 3, 112, 112), normalised.

    Returns:
        patch features (n, 196, 128) and [CLS] (n, 128) of layer -2, and [CLS] (n, 128) of the last layer.
    """
    output = model.model.vision_tower(images, output_hidden_states=True)
    used = output.hidden_states[-2]
    return used[:, 1:], used[:, 0], output.pooler_output


def answer(model, features, tokens):
    """Runs projector and language model on all questions about each image at once.

    Args:
        features: (n, visual tokens, 128), in the order in which the language model shall see them.
        tokens: int64 (n, questions, LENGTH).

    Returns:
        logits (n, questions, LENGTH, vocabulary).
    """
    language = model.model.language_model
    count, questions, length = tokens.shape
    start = language.embed_tokens(torch.tensor([[BOS, USER]])).expand(count, -1, -1)
    seen = model.model.multi_modal_projector(features)
    states = torch.cat([start, seen, language.embed_tokens(tokens.flatten(1))], 1)
    prefix = 2 + seen.shape[1]
    positions = torch.cat([torch.arange(prefix), (prefix + torch.arange(length)).repeat(questions)])[None]
    rotary = language.rotary_emb(states, positions)
    for layer in language.layers:
        states = layer(states, attention_mask=None, position_embeddings=rotary, prefix=prefix)
    return model.lm_head(language.norm(states[:, prefix:])).view(count, questions, length, -1)
