"""What the tests of several architectures share."""

import torch

from hf_compress.engine.tokens import attention, states
from hf_compress.patches.registry import adapter_for
from tests.tiny import GREEDY, IMG, VID

TOLERANCE = 5e-5  # logits have a standard deviation of 1.7; one wrong row moves them by more than 0.1


def greedy(model, batch, **kwargs):
    """New tokens (B, T), logits (B, T, V) and all that generate returned."""
    out = model.generate(**batch, **(GREEDY | kwargs), return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, batch["input_ids"].shape[1] :], torch.stack(out.logits, 1), out


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


def tower_rows(model, call, block):
    """(N, H) per crop: the attention row of [CLS], of towers without one what is received."""
    adapter = adapter_for(model)
    return attention(
        adapter, model, call, call.reads[block, "attention"], "cls" if adapter.cls_tokens(model) else "all"
    )


def tower_keys(model, call, block):
    """(N, d) per crop: the keys of the same, their mean over heads."""
    return states(adapter_for(model), model, call, [key for _, key, _ in call.reads[block, "attention"]])


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
