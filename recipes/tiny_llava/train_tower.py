"""Stage 1: teaches the vision tower what each patch and the whole scene show.

The patch features must say which object and colour they lie on and, where they lie on an object, in which cell, so
that the language model need not rely on the order of the visual tokens. [CLS] must know all objects, so that its
attention finds them. A background patch must keep its feature whatever objects lie elsewhere.
"""

import torch
import torch.nn.functional as F
from model import look
from parallel import train
from render import IGNORED, MicroBatches

MICRO_BATCH, ROWS = 16, 4  # scenes per micro-batch, micro-batches per step
RATES = (1e-3, 2e-3)  # AdamW, Muon
BACKGROUND_WEIGHT = 0.3  # most patches are background


def tower_losses(model, heads, batch):
    """Losses of one micro-batch, whose scenes 2 i and 2 i + 1 share a background; a dict of scalars."""
    patches, cls_used, cls_last = look(model, batch["image"])
    normed = heads.patch_norm(patches)
    weight = torch.ones(heads.patch_class.out_features)
    weight[0] = BACKGROUND_WEIGHT
    present = batch["present"].float()
    losses = {
        "class": _cross_entropy(heads.patch_class(normed), batch["patch_class"], weight=weight),
        "color": _cross_entropy(heads.patch_color(normed), batch["patch_color"]),
        "cell": _cross_entropy(heads.patch_cell(normed), batch["patch_cell"]),
        "cls_last": F.binary_cross_entropy_with_logits(heads.present_last(cls_last).float(), present),
        "cls_used": F.binary_cross_entropy_with_logits(heads.present_used(heads.cls_norm(cls_used)).float(), present),
        "same": _invariance(patches, batch["touched"]),
    }
    shares = {"class": 1.0, "color": 0.5, "cell": 0.3, "cls_last": 1.0, "cls_used": 0.5, "same": 1.0}
    return losses | {"total": sum(shares[name] * loss for name, loss in losses.items())}


def _cross_entropy(logits, targets, weight=None):
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), weight, ignore_index=IGNORED)


def _invariance(patches, touched):
    """Squared difference of the features of patches that no object touches in either scene of a pair."""
    features = F.layer_norm(patches.float(), patches.shape[-1:])
    free = (touched[0::2] + touched[1::2] == 0).float()
    difference = (features[0::2] - features[1::2]).pow(2).mean(-1)
    return (difference * free).sum() / free.sum()


@torch.no_grad()
def tower_accuracy(model, heads, folder, batches=16):
    """Accuracy of the read-outs on rendered scenes: patches on digits, colours and cells of objects, [CLS] facts."""
    read, hits = MicroBatches(folder, 64), {}
    for number in range(batches):
        batch = read[number]
        patches, _, cls_last = look(model, batch["image"])
        normed = heads.patch_norm(patches)
        digit = (batch["patch_class"] > 0) & (batch["patch_class"] <= 10)
        for name, where in (("class", digit), ("color", batch["patch_class"] > 0), ("cell", batch["patch_cell"] >= 0)):
            label = batch[f"patch_{name}"]
            right = getattr(heads, f"patch_{name}")(normed).argmax(-1) == label
            hits.setdefault(name, []).append(right[where].float().mean())
        right = (heads.present_last(cls_last) > 0) == (batch["present"] > 0)
        hits.setdefault("cls", []).append(right.float().mean())
    return {name: round(torch.stack(values).mean().item(), 4) for name, values in hits.items()}


def train_tower(model, heads, folder, images, seed=0, processes=2):
    """Trains the tower of `model` (bf16, in place) and `heads` on scenes that `render` put into `folder`.

    Args:
        images: image passes, over several epochs if there are fewer scenes.
        seed: of the order of the scenes.

    Returns:
        fp32 weights: of the tower by their name in `model`, of the heads as "heads." and their name.
    """
    tower = model.model.vision_tower
    named = [(f"model.vision_tower.{name}", p) for name, p in tower.named_parameters()]
    named += [(f"heads.{name}", p) for name, p in heads.named_parameters()]
    batches = MicroBatches(folder, MICRO_BATCH, seed)
    return train(
        named,
        lambda number: tower_losses(model, heads, batches[number]),
        steps=images // (MICRO_BATCH * ROWS),
        rows=ROWS,
        rates=RATES,
        processes=processes,
    )
