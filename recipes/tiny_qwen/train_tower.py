"""Stage 1: teaches the vision tower what each visual token and the whole scene show, at many resolutions.

The four patches of a token together must say which object and color they lie on. What the attention of the last block
gathers must know all objects: each patch adds to it by the attention that it receives, so objects come to receive more
than the background. A background token must keep its features whatever objects lie elsewhere.
"""

import numpy as np
import torch
import torch.nn.functional as F
from data import draw_grid, resize, token_labels
from model import look
from parallel import train, train_alone
from processor import MOST
from render import IGNORED, MicroBatches

SHAPES = {"cpu": (8, 4), "cuda": (32, 2)}  # scenes per micro-batch, micro-batches per step
RATES = (1e-3, 2e-3)  # AdamW, Muon
BACKGROUND_WEIGHT = 0.3  # most tokens are background


def tower_losses(model, heads, batch, rng):
    """Losses of one micro-batch, whose scenes 2 i and 2 i + 1 share a background; a dict of scalars."""
    grid = draw_grid(rng)
    tokens, gathered = look(model, resize(batch["image"], grid))
    labels = token_labels(batch, grid)
    normed = heads.norm(tokens.flatten(2))
    weight = torch.ones(heads.token_class.out_features, device=normed.device)
    weight[0] = BACKGROUND_WEIGHT
    present = heads.present(heads.pooled_norm(gathered)).float()
    losses = {
        "class": _cross_entropy(heads.token_class(normed), labels["class"], weight=weight),
        "color": _cross_entropy(heads.token_color(normed), labels["color"]),
        "present": F.binary_cross_entropy_with_logits(present, batch["present"].float()),
        "same": _invariance(tokens, labels["touched"]),
    }
    shares = {"class": 1.0, "color": 0.5, "present": 1.0, "same": 1.0}
    return losses | {"total": sum(shares[name] * loss for name, loss in losses.items())}


def _cross_entropy(logits, targets, weight=None):
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), weight, ignore_index=IGNORED)


def _invariance(tokens, touched):
    """Squared difference of the features of tokens that no object touches in either scene of a pair."""
    features = F.layer_norm(tokens.float(), tokens.shape[-1:])
    free = (touched[0::2] + touched[1::2] == 0).float()
    difference = (features[0::2] - features[1::2]).pow(2).mean((-1, -2))
    return (difference * free).sum() / free.sum()


@torch.no_grad()
def tower_accuracy(model, heads, folder, grid=(MOST, MOST), batches=16):
    """Accuracy of the read-outs on rendered scenes: tokens on digits, colors of objects, facts of the scene."""
    read, hits = MicroBatches(folder, 64, device=model.device), {"class": [], "color": [], "present": []}
    for number in range(batches):
        batch = read[number]
        tokens, gathered = look(model, resize(batch["image"], grid))
        normed, labels = heads.norm(tokens.flatten(2)), token_labels(batch, grid)
        digit = (labels["class"] > 0) & (labels["class"] <= 10)
        for name, where in (("class", digit), ("color", labels["class"] > 0)):
            right = getattr(heads, f"token_{name}")(normed).argmax(-1) == labels[name]
            hits[name].append(right[where].float().mean())
        right = (heads.present(heads.pooled_norm(gathered)) > 0) == (batch["present"] > 0)
        hits["present"].append(right.float().mean())
    return {name: round(torch.stack(values).mean().item(), 4) for name, values in hits.items()}


def train_tower(model, heads, folder, images, seed=0, processes=2):
    """Trains the tower of `model` (bf16, in place), all but its merger, and `heads` on rendered scenes.

    Args:
        folder: what `render` filled.
        images: image passes, over several epochs if there are fewer scenes.
        seed: of the order of the scenes and of their resolutions.

    Returns:
        fp32 weights: of the tower by their name in `model`, of the heads as "heads." and their name.
    """
    tower = model.model.visual
    named = [(f"model.visual.{name}", p) for name, p in tower.named_parameters() if not name.startswith("merger.")]
    named += [(f"heads.{name}", p) for name, p in heads.named_parameters()]
    size, rows = SHAPES[model.device.type]
    batches = MicroBatches(folder, size, seed, model.device)

    def losses(number):
        return tower_losses(model, heads, batches[number], np.random.RandomState([seed, number]))

    if model.device.type == "cpu":
        return train(named, losses, images // (size * rows), rows, RATES, processes)
    return train_alone(named, losses, images // (size * rows), rows, RATES)
