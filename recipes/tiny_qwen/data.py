"""Rendered scenes of `tiny_llava` with what is needed to label them at any resolution."""

import numpy as np
import torch.nn.functional as F
from processor import FEWEST, MOST, TOKEN
from render import ARRAYS, IGNORED, present_facts

from hf_compress.demo.scenes import COLOR_NAMES, NAMES, SIZE

OBJECTS = 7  # the most that a scene has
LEAST = 6 / 64  # share of a token that an object must cover to name it
SCENE_ARRAYS = {name: ARRAYS[name] for name in ("image", "present", "tokens", "targets")} | {
    "owner": ((SIZE, SIZE), np.uint8),  # 0 background, 1 + i where object i is painted
    "objects": ((OBJECTS, 2), np.int8),  # class (1 + index into NAMES) and color (index into COLOR_NAMES), or IGNORED
}


def describe(scene):
    """What `render` stores of a scene beside its image and questions."""
    objects = np.full((OBJECTS, 2), IGNORED, np.int8)
    for i, o in enumerate(scene.objects):
        objects[i] = 1 + NAMES.index(o.name), COLOR_NAMES.index(o.color)
    return {"present": present_facts(scene.objects), "owner": scene.owner, "objects": objects}


def draw_grid(rng):
    """Rows and columns of visual tokens of a micro-batch: 14 x 14 for 30 %, else 8 to 14 each, nearly square."""
    if rng.rand() < 0.3:
        return MOST, MOST
    rows = rng.randint(FEWEST, MOST + 1)
    return rows, int(np.clip(rows + rng.randint(-2, 3), FEWEST, MOST))


def resize(images, grid):
    """(n, 3, 112, 112) to the size of which a grid of (rows, columns) tokens is made."""
    size = grid[0] * TOKEN, grid[1] * TOKEN
    if size == images.shape[-2:]:
        return images
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True).to(images.dtype)


def token_labels(batch, grid):
    """What each visual token shows.

    Args:
        batch: "owner" (n, 112, 112) and "objects" (n, 7, 2).
        grid: rows and columns of tokens.

    Returns:
        dict of tensors (n, rows * columns): "object" (number in the scene, or IGNORED), "class" (0 background),
        "color" (or IGNORED), and "touched", 1.0 where an object or its rim may show.
    """
    painted = F.one_hot(batch["owner"], 1 + OBJECTS)[..., 1:].permute(0, 3, 1, 2).float()
    share, number = F.adaptive_avg_pool2d(painted, grid).flatten(2).max(1)
    shown = share >= LEAST
    of_token = batch["objects"].gather(1, number[..., None].expand(-1, -1, 2))
    rim = F.max_pool2d((batch["owner"] > 0).float()[:, None], 5, 1, 2)
    return {
        "object": number.masked_fill(~shown, IGNORED),
        "class": of_token[..., 0].masked_fill(~shown, 0),
        "color": of_token[..., 1].masked_fill(~shown, IGNORED),
        "touched": F.adaptive_max_pool2d(rim, grid).flatten(1),
    }
