"""The language model on embeddings, positions and DeepStack features that are cut by hand: no code of the engine."""

import torch

from tests.tiny import GREEDY, IMG, TOKEN_KEYS, VID

TOLERANCE = 5e-5  # logits have a standard deviation of 1.7; one wrong row moves them by more than 0.1
MODALITIES = {"image": IMG, "video": VID}


def greedy(model, batch, **kwargs):
    """New tokens (B, T), logits (B, T, V) and all that generate returned."""
    out = model.generate(**batch, **(GREEDY | kwargs), return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, 1), out


def visual_inputs(batch):
    """What a batch holds besides tokens."""
    return {key: value for key, value in batch.items() if key not in TOKEN_KEYS}


def encode(model, batch):
    """{modality: output of the tower} for what the batch holds, from `model.base_model`."""
    calls = {
        "image": ("pixel_values", "image_grid_thw", "image_sizes"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    found = {}
    for modality, names in calls.items():
        given = {name: batch[name] for name in names if name in batch}
        if any(name.startswith("pixel_values") for name in given):
            found[modality] = getattr(model.base_model, f"get_{modality}_features")(**given, return_dict=True)
    return found


@torch.no_grad()
def short_logits(model, sample, tokens, kept):
    """(T, V): what generate must give at every step if of each image only `kept` is read.

    Args:
        model: bare. sample: one unpadded row. tokens: (T,) that were generated.
        kept: indices into the rows of every image, then of every video.
    """
    ids = torch.cat([sample["input_ids"], tokens[None, :-1]], 1)
    x, length, prompt = model.get_input_embeddings()(ids)[0].clone(), ids.shape[1], sample["input_ids"].shape[1]
    visual, stay, deep, at = torch.zeros(length, dtype=torch.bool), torch.ones(length, dtype=torch.bool), [], 0
    for modality, out in encode(model, sample).items():
        where = (ids[0, :prompt] == MODALITIES[modality]).nonzero()[:, 0]
        x[where], visual[where], stay[where] = torch.cat(list(out.pooler_output)), True, False
        for rows in where.split([len(image) for image in out.pooler_output]):
            stay[rows[kept[at]]] = True
            at += 1
        for layer, features in enumerate(getattr(out, "deepstack_features", None) or []):
            if layer == len(deep):
                deep.append(torch.zeros_like(x))
            deep[layer][where] = torch.cat(list(features))
    assert at == len(kept)
    extras = {}
    if deep:
        extras = dict(visual_pos_masks=visual[None, stay], deepstack_visual_embeds=[d[visual & stay] for d in deep])
    if hasattr(model.base_model, "get_rope_index"):
        given = {k: v for k, v in sample.items() if not k.startswith("pixel_values")}
        first = model.base_model.get_rope_index(**given)[0]
        more = first[..., -1:] + torch.arange(1, length - prompt + 1)
        positions = torch.cat([first, more], -1)[..., stay]
    else:
        positions = torch.arange(int(stay.sum()))[None]
    mask = torch.ones(1, int(stay.sum()), dtype=torch.long)
    out = model.get_decoder()(
        inputs_embeds=x[None, stay], position_ids=positions, attention_mask=mask, use_cache=False, **extras
    )
    return model.lm_head(out.last_hidden_state)[0, -len(tokens) :]


def next_turn(batch, out, more):
    """Prompt of a second turn: all that was said, and the tokens `more`."""
    ids = torch.cat([out.sequences, torch.tensor([more] * len(out.sequences))], 1)
    new = torch.ones(len(ids), ids.shape[1] - batch["input_ids"].shape[1], dtype=torch.long)
    turn = dict(input_ids=ids, attention_mask=torch.cat([batch["attention_mask"], new], 1))
    if "mm_token_type_ids" in batch:
        turn["mm_token_type_ids"] = (ids == IMG).int() + 2 * (ids == VID).int()
    return turn


def counts(model):
    """[[visual tokens kept per image] per sample] of the last prompt."""
    return [[len(kept) for kept in sample] for sample in model.compression.last.visual_kept]


def hooks(model):
    """Everything that hangs on the modules of a model."""
    return [
        (path, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__), id(getattr(m, "config", None)))
        for path, m in model.named_modules()
    ]
