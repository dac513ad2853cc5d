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
from visible import visible_tokens

MICRO_BATCH, ROWS = 8, 4
RATES = (1e-3, 4e-3)  # AdamW, Muon
SPARSE, SHUFFLED = 0.6, 0.5  # shares of the micro-batches


def answer_losses(model, batch, rng):
    """Cross entropy of the answers of one micro-batch, and their share of right tokens; a dict of scalars."""
    with torch.no_grad():
        features, _, _ = look(model, batch["image"])
    order = torch.arange(PATCHES).expand(len(features), -1)
    if rng.rand() < SPARSE:
        order = visible_tokens(batch["patch_class"] > 0, batch["patch_cell"], rng)
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
