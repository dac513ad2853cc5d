"""Stage 2: teaches merger and language model to answer, with the rest of the tower frozen.

Micro-batches differ in resolution. For most of them the language model sees only some of the visual tokens, at the
positions that they have in the whole image, and for some in shuffled order. So removing tokens measures what is lost
with them, not that the model has never seen a sparse image.
"""

import numpy as np
import torch
import torch.nn.functional as F
from data import draw_grid, resize, token_labels
from model import answer, look
from parallel import train, train_alone
from render import IGNORED, MicroBatches
from visible import visible_tokens

SHAPES = {"cpu": (8, 4), "cuda": (32, 2)}  # scenes per micro-batch, micro-batches per step
RATES = (1e-3, 4e-3)  # AdamW, Muon
SPARSE, SHUFFLED = 0.6, 0.25  # shares of the micro-batches


def answer_losses(model, batch, rng):
    """Cross entropy of the answers of one micro-batch, and their share of right tokens; a dict of scalars."""
    grid = draw_grid(rng)
    with torch.no_grad():
        seen, _ = look(model, resize(batch["image"], grid))
    order = torch.arange(seen.shape[1]).expand(len(seen), -1)
    if rng.rand() < SPARSE:
        labels = token_labels(batch, grid)
        order = visible_tokens(labels["class"] > 0, labels["object"], rng)
    if rng.rand() < SHUFFLED:
        order = order.gather(1, torch.from_numpy(np.argsort(rng.rand(*order.shape), 1)))
    order = order.to(seen.device)
    seen = seen.gather(1, order[..., None, None].expand(-1, -1, *seen.shape[2:]))
    asked = batch["targets"] != IGNORED
    logits, targets = answer(model, seen, order, grid, batch["tokens"])[asked].float(), batch["targets"][asked]
    right = (logits.argmax(-1) == targets).float().mean()
    return {"total": F.cross_entropy(logits, targets), "right": right}


def train_lm(model, folder, images, seed=0, processes=2):
    """Trains merger and language model of `model` (bf16, in place) on scenes that `render` put into `folder`.

    Args:
        images: image passes; each comes with its 16 questions.
        seed: of the order of the scenes, of resolutions and of the choice of visual tokens.

    Returns:
        their fp32 weights, name in `model` -> tensor.
    """
    tower = model.model.visual
    tower.requires_grad_(False)
    tower.merger.requires_grad_(True)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    size, rows = SHAPES[model.device.type]
    batches = MicroBatches(folder, size, seed, model.device)

    def losses(number):
        return answer_losses(model, batches[number], np.random.RandomState([seed, number]))

    if model.device.type == "cpu":
        return train(named, losses, images // (size * rows), rows, RATES, processes)
    return train_alone(named, losses, images // (size * rows), rows, RATES)
