"""Stage 2: teaches projector and language model to answer, with the tower frozen.

For most micro-batches the language model sees only some of the visual tokens, and for half of them in shuffled
order. A real model has met images of many resolutions and aspect ratios; without this, a model of one resolution
has never seen a sparse image, and removing tokens measures that instead of what was lost.
"""

import numpy as np
import torch
import torch.nn.functional as F
from model import answer, look
from parallel import train
from render import IGNORED, PATCHES, MicroBatches

from hf_compress.demo.scenes import GRID

MICRO_BATCH, ROWS = 8, 4
RATES = (1e-3, 4e-3)  # AdamW, Muon
SPARSE, SHUFFLED = 0.6, 0.5  # shares of the micro-batches
FEWEST = 16  # visual tokens


def visible_tokens(batch, rng):
    """Chooses which visual tokens the language model sees: a number from 16 to 196, log-uniform.

    Of every object at least one to three patches stay, so that the answers remain right. The share of background
    among the rest varies from its natural one to almost none.

    Args:
        batch: "patch_class" and "patch_cell", (n, 196) each.
        rng: `numpy.random.RandomState`.

    Returns:
        int64 (n, kept), ascending.
    """
    kept = round(np.exp(rng.uniform(np.log(FEWEST), np.log(PATCHES))))
    on_object, cell = (batch["patch_class"] > 0).numpy(), batch["patch_cell"].numpy()
    least = 1 if kept < 24 else rng.choice((1, 2, 3))
    score = rng.rand(*cell.shape) + on_object * rng.choice((0.0, 0.0, 0.3, 1.0), (len(cell), 1))
    draw = rng.rand(*cell.shape)
    for place in range(GRID * GRID):
        of_object = np.where(on_object & (cell == place), draw, -1.0)
        threshold = np.sort(of_object, 1)[:, -least, None]
        score[(of_object >= threshold) & (of_object >= 0)] += 10
    return torch.from_numpy(np.sort(np.argsort(-score, 1)[:, :kept], 1))


def answer_losses(model, batch, rng):
    """Cross entropy of the answers of one micro-batch, and their share of right tokens; a dict of scalars."""
    with torch.no_grad():
        features, _, _ = look(model, batch["image"])
    order = torch.arange(PATCHES).expand(len(features), -1)
    if rng.rand() < SPARSE:
        order = visible_tokens(batch, rng)
    if rng.rand() < SHUFFLED:
        order = order.gather(1, torch.from_numpy(np.argsort(rng.rand(*order.shape), 1)))
    features = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1]))
    asked = batch["targets"] != IGNORED
    logits, targets = answer(model, features, batch["tokens"])[asked].float(), batch["targets"][asked]
    right = (logits.argmax(-1) == targets).float().mean()
    return {"total": F.cross_entropy(logits, targets), "right": right}


def train_lm(model, folder, images, seed=0, processes=2):
    """Trains projector and language model of `model` (bf16, in place) on scenes that `render` put into `folder`.

    Args:
        images: image passes; each comes with its 16 questions.
        seed: of the order of the scenes and of the choice of visual tokens.

    Returns:
        their fp32 weights, name in `model` -> tensor.
    """
    model.model.vision_tower.requires_grad_(False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    batches = MicroBatches(folder, MICRO_BATCH, seed)
    return train(
        named,
        lambda number: answer_losses(model, batches[number], np.random.RandomState([seed, number])),
        steps=images // (MICRO_BATCH * ROWS),
        rows=ROWS,
        rates=RATES,
        processes=processes,
    )
