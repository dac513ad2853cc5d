"""Renders scenes to memory-mapped arrays once, because rendering costs more than the vision tower does."""

import multiprocessing
from pathlib import Path

import numpy as np
import torch
from vocabulary import ASSISTANT, EOS, MEAN, PAD, PATCH, STD, VOCABULARY, encode

from hf_compress.demo.scenes import COLOR_NAMES, NAMES, SIZE, SceneRenderer, ask

SIDE = SIZE // PATCH  # patches per side
PATCHES = SIDE * SIDE
ASKED = 16  # questions per scene
LENGTH = 12  # tokens per question with its answer
PRESENT = len(NAMES) + 2 * len(COLOR_NAMES)  # facts that [CLS] learns: each name, each colour of digits and shapes
IGNORED = -100  # target that the loss leaves out

ARRAYS = {  # name -> (shape per scene, dtype)
    "image": ((SIZE, SIZE, 3), np.uint8),
    "patch_class": ((PATCHES,), np.int8),  # 0 background, else 1 + index into NAMES
    "patch_color": ((PATCHES,), np.int8),  # index into COLOR_NAMES, or IGNORED
    "patch_cell": ((PATCHES,), np.int8),  # cell of the object whose box covers the patch's centre, or IGNORED
    "touched": ((PATCHES,), np.uint8),  # 1 where an object or its rim may show
    "present": ((PRESENT,), np.uint8),
    "tokens": ((ASKED, LENGTH), np.uint8),
    "targets": ((ASKED, LENGTH), np.int8),  # next token where it belongs to the answer, else IGNORED
}


def patch_labels(scene, least=6):
    """Class, colour, cell and touch of each patch; see ARRAYS.

    Args:
        scene: a `Scene`.
        least: pixels of an object that a patch must hold to be labelled with it.

    Returns:
        dict of arrays (196,).
    """
    labels = {name: np.zeros((SIDE, SIDE), np.int8) for name in ("patch_class", "touched")}
    labels |= {name: np.full((SIDE, SIDE), IGNORED, np.int8) for name in ("patch_color", "patch_cell")}
    most = np.full((SIDE, SIDE), least - 1)
    center = (np.arange(SIDE) + 0.5) * PATCH
    for i, o in enumerate(scene.objects):
        left, top, right, bottom = o.box
        pixels = (scene.owner == i + 1).reshape(SIDE, PATCH, SIDE, PATCH).sum((1, 3))
        wins = pixels > most
        most[wins] = pixels[wins]
        labels["patch_class"][wins] = 1 + NAMES.index(o.name)
        labels["patch_color"][wins] = COLOR_NAMES.index(o.color)
        inside = (center > top - 2) & (center < bottom + 2), (center > left - 2) & (center < right + 2)
        labels["patch_cell"][np.ix_(*inside)] = o.cell
        labels["touched"][(top - 1) // PATCH : bottom // PATCH + 1, (left - 1) // PATCH : right // PATCH + 1] = 1
    return {name: label.reshape(-1) for name, label in labels.items()}


def present_facts(objects):
    """What the scene holds, uint8 (26,): ten digits, four shapes, six colours of digits, six colours of shapes."""
    facts = np.zeros(PRESENT, np.uint8)
    for o in objects:
        facts[NAMES.index(o.name)] = 1
        facts[len(NAMES) + COLOR_NAMES.index(o.color) + (len(COLOR_NAMES) if o.kind == "shape" else 0)] = 1
    return facts


def token_block(question, answer, vocabulary=VOCABULARY):
    """One question with its answer as (tokens, targets), two lists of LENGTH; the last target is </s>."""
    asked, said = [*encode(question, vocabulary), ASSISTANT], encode(answer, vocabulary)
    targets = [IGNORED] * (len(asked) - 1) + said + [EOS]
    rest = LENGTH - len(targets)
    assert rest >= 0, (question, answer)
    return asked + said + [PAD] * rest, targets + [IGNORED] * rest


def describe(scene):
    """What is stored of a scene beside its image and its questions; see ARRAYS."""
    return patch_labels(scene) | {"present": present_facts(scene.objects)}


def _fill(arrays, describe, split, seed, indices):
    renderer = SceneRenderer(split, seed, share=2)
    for index in indices:
        scene = renderer[index]
        asked = ask(scene.objects, ASKED, renderer.rng("questions", index))
        blocks = [token_block(question, answer) for _, question, answer in asked]
        labels = describe(scene) | {"image": scene.pixels}
        labels["tokens"], labels["targets"] = zip(*blocks, strict=True)
        for name, value in labels.items():
            arrays[name][index] = value


def render(folder, split, scenes, seed, processes=2, arrays=ARRAYS, describe=describe):
    """Renders `scenes` scenes into `folder` (42 kB each); does nothing where they lie there already.

    Scenes 2 i and 2 i + 1 share a background.

    Args:
        folder: directory, made if absent.
        split: a split of `hf_compress.demo.scenes`.
        scenes: how many; an even number.
        seed: any integer.
        processes: how many render at the same time.
        arrays: what to store, as ARRAYS.
        describe: function of a `Scene` that returns all of it but "image", "tokens" and "targets".
    """
    folder = Path(folder)
    done = folder / "done"
    if done.exists() and done.read_text() == f"{split} {scenes} {seed}":
        return
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (scenes, *shape))
        for name, (shape, dtype) in arrays.items()
    }
    parts = [range(scenes * i // processes, scenes * (i + 1) // processes) for i in range(processes)]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_fill, args=(stored, describe, split, seed, part)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"rendering the {split} split failed; see the message above")
    done.write_text(f"{split} {scenes} {seed}")


class MicroBatches:
    """Micro-batches of rendered scenes; `batches[number]` depends on the number and the seed alone.

    Pairs of scenes with the same background stay together; each epoch shuffles the pairs anew.

    Args:
        folder: what `render` filled.
        size: scenes per micro-batch; an even number.
        seed: of the shuffling.
        device: where the tensors shall be.
    """

    def __init__(self, folder, size, seed=0, device="cpu"):
        self.arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(Path(folder).glob("*.npy"))}
        self.size, self.seed = size, seed
        self.device = device
        self.per_epoch = len(self.arrays["image"]) // size
        self.epoch, self.order = None, None

    def __getitem__(self, number):
        """dict of tensors (size, ...) named as what `render` stored; images by `prepare`, integers as int64."""
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            pairs = np.random.RandomState([self.seed, epoch]).permutation(len(self.arrays["image"]) // 2)
            self.epoch, self.order = epoch, np.stack([2 * pairs, 2 * pairs + 1], 1).ravel()
        chosen = self.order[place * self.size : (place + 1) * self.size]
        batch = {name: torch.from_numpy(array[chosen]).to(self.device) for name, array in self.arrays.items()}
        return {name: prepare(t) if name == "image" else t.long() for name, t in batch.items()}


def normalise(images):
    """uint8 (n, height, width, 3) to fp32 (n, 3, height, width), as the processor does."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def prepare(images):
    """uint8 (n, 112, 112, 3) to normalised bf16 (n, 3, 112, 112)."""
    return normalise(images).bfloat16()
