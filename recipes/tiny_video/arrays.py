"""What training reads of a clip: what the frozen tower sees of it, once for all epochs, and its questions."""

from pathlib import Path

import numpy as np
import torch
from begin import VOCABULARY
from model import WIDTH, look
from processor import MERGE, TOKEN
from render import ASKED, IGNORED, LENGTH, prepare, token_block

from hf_compress.demo.clips import MOMENTS, NEW, SIDE, ClipRenderer, ask

GRID = (SIDE // TOKEN, SIDE // TOKEN)  # rows and columns of visual tokens of a moment
TOKENS = MOMENTS * GRID[0] * GRID[1]  # of a clip
OBJECTS = 2 + NEW
LEAST = 6  # pixels of an object that a token must hold to show it
CHUNK = 8  # clips that the tower sees at a time
ARRAYS = {  # name -> (shape per clip, dtype)
    "seen": ((TOKENS, MERGE**2, WIDTH), np.float16),
    "owner": ((TOKENS,), np.int8),  # number of the object that a token shows, or IGNORED
    "needed": ((OBJECTS, MOMENTS), np.uint8),  # 1 where an answer may depend on seeing the object
    "tokens": ((ASKED, LENGTH), np.uint8),
    "targets": ((ASKED, LENGTH), np.int8),
}


def describe(clip, asked):
    """All of a clip but what the tower sees; see ARRAYS."""
    rows, columns = GRID
    painted = np.stack([clip.owner == 1 + i for i in range(OBJECTS)], -1)
    counts = painted.reshape(MOMENTS, rows, TOKEN, columns, TOKEN, OBJECTS).sum((2, 4)).reshape(TOKENS, OBJECTS)
    needed = np.zeros((OBJECTS, MOMENTS), np.uint8)
    for i, o in enumerate(clip.objects):
        needed[i, [o.first, o.last]] = 1
    blocks = [token_block(question, answer, VOCABULARY) for _, question, answer in asked]
    tokens, targets = zip(*blocks, strict=True)
    owner = np.where(counts.max(1) >= LEAST, counts.argmax(1), IGNORED)
    return {"owner": owner, "needed": needed, "tokens": tokens, "targets": targets}


@torch.no_grad()
def encode(model, folder, split, clips, seed):
    """Renders clips into `folder`, 0.4 MB each, as the tower of `model` (bf16) sees them; goes on after a stop."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    start = int(done.read_text()) if done.exists() else 0
    stored = {}
    for name, (shape, dtype) in ARRAYS.items():
        path, whole = folder / f"{name}.npy", (clips, *shape)
        new = {"mode": "r+"} if path.exists() else {"mode": "w+", "dtype": dtype, "shape": whole}
        stored[name] = np.lib.format.open_memmap(path, **new)
        if len(stored[name]) < clips:
            raise ValueError(f"{path} holds {len(stored[name])} clips, not {clips}; name another cache folder")
    renderer = ClipRenderer(split, seed)
    for first in range(start, clips, CHUNK):
        these = range(first, min(first + CHUNK, clips))
        rendered = [renderer[index] for index in these]
        images = prepare(torch.from_numpy(np.concatenate([clip.pixels for clip in rendered])))
        seen, _ = look(model, images)
        for index, clip, mine in zip(these, rendered, seen.view(len(these), TOKENS, MERGE**2, WIDTH), strict=True):
            values = describe(clip, ask(clip.objects, ASKED, renderer.rng("questions", index)))
            for name, value in {**values, "seen": mine.half().numpy()}.items():
                stored[name][index] = value
        done.write_text(str(these[-1] + 1))
        if first % 400 == 0:
            print(f"encoded {these[-1] + 1}/{clips}", flush=True)


class Clips:
    """Micro-batches of the first `clips` that `encode` put there; each depends on its number and the seed alone."""

    def __init__(self, folder, clips, size, seed=0):
        self.arrays = {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r")[:clips] for name in ARRAYS}
        self.size, self.seed = size, seed
        self.per_epoch = clips // size

    def __getitem__(self, number):
        """dict of tensors (size, ...): "seen" in bf16, the others int64."""
        epoch, place = divmod(number, self.per_epoch)
        order = np.random.RandomState([self.seed, epoch]).permutation(len(self.arrays["seen"]))
        chosen = order[place * self.size : (place + 1) * self.size]
        batch = {name: torch.from_numpy(array[chosen]) for name, array in self.arrays.items()}
        return {name: t.bfloat16() if name == "seen" else t.long() for name, t in batch.items()}


def visible(owner, needed, rng, fewest, most):
    """Chooses which tokens the language model sees: a number of them, log-uniform, the same for all clips.

    Of every object at least one to three stay in each moment that an answer may depend on, and in none, half or all of
    the other moments. The share of background among the rest varies from its natural one to almost none.

    Args:
        owner: int (n, TOKENS); needed: int (n, OBJECTS, MOMENTS); as of ARRAYS.
        rng: `numpy.random.RandomState`.

    Returns:
        int64 (n, kept), ascending.
    """
    owner, needed = owner.numpy(), needed.numpy()
    kept = round(np.exp(rng.uniform(np.log(fewest), np.log(most))))
    least, often = rng.choice((1, 2, 3)), rng.choice((0.0, 0.5, 1.0))
    wanted = (needed > 0) | (rng.rand(*needed.shape) < often)
    on = owner >= 0
    moment = np.arange(TOKENS) // (TOKENS // MOMENTS)
    score = rng.rand(*owner.shape) + on * rng.choice((0.0, 0.0, 0.3, 1.0), (len(owner), 1))
    for mine, shows, want, values in zip(owner, on, wanted, score, strict=True):
        at = np.flatnonzero(shows)
        at = at[np.lexsort((rng.rand(len(at)), mine[at], moment[at]))]
        part = mine[at] * MOMENTS + moment[at]
        begins = np.flatnonzero(np.r_[True, part[1:] != part[:-1]])
        rank = np.arange(len(at)) - np.repeat(begins, np.diff(np.r_[begins, len(at)]))
        values[at] += 10 * ((rank < least) & want[mine[at], moment[at]])
    return torch.from_numpy(np.sort(np.argsort(-score, 1)[:, :kept], 1))
