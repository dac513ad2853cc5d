"""Which visual tokens the language model sees in training."""

import numpy as np
import torch

from hf_compress.demo.scenes import GRID

FEWEST = 16  # visual tokens


def visible_tokens(on_object, place, rng):
    """Chooses which visual tokens the language model sees: a number from 16 to all, log-uniform.

    Of every object at least one to three stay, so that the answers remain right. The share of background among the
    rest varies from its natural one to almost none.

    Args:
        on_object: bool (n, tokens).
        place: int (n, tokens), a number from 0 to 8 for each object of an image, such as its cell.
        rng: `numpy.random.RandomState`.

    Returns:
        int64 (n, kept), ascending.
    """
    on_object, place = on_object.cpu().numpy(), place.cpu().numpy()
    kept = round(np.exp(rng.uniform(np.log(FEWEST), np.log(place.shape[1]))))
    least = 1 if kept < 24 else rng.choice((1, 2, 3))
    score = rng.rand(*place.shape) + on_object * rng.choice((0.0, 0.0, 0.3, 1.0), (len(place), 1))
    draw = rng.rand(*place.shape)
    for number in range(GRID * GRID):
        of_object = np.where(on_object & (place == number), draw, -1.0)
        threshold = np.sort(of_object, 1)[:, -least, None]
        score[(of_object >= threshold) & (of_object >= 0)] += 10
    return torch.from_numpy(np.sort(np.argsort(-score, 1)[:, :kept], 1))
