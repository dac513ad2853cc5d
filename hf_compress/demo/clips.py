"""Short clips with exact answers: what moves, what appears and vanishes, and what never changes, over a photograph.

A clip has eight moments of two equal frames (what Qwen2-VL and its successors join), 64 x 64 pixels, RGB, two frames a
second. Its background is a crop of a real photograph that does not change but for noise. On it, at different places of
a 3 x 3 grid: one object that moves evenly in one of eight directions, one that never changes, and three handwritten
digits that appear one after another, two of which stay while the third vanishes after one moment. All five have
different names, so questions and answers follow by rule.

Clip `index` of a split is a pure function of (split, seed, index), as scenes are (`hf_compress.demo.scenes`); splits
share neither handwritten digits nor photographs.
"""

import random
from dataclasses import dataclass

import numpy as np

from hf_compress.demo.scenes import (
    COLOR_NAMES,
    COLORS,
    DIGITS,
    GRID,
    NAMES,
    PLACES,
    background,
    digit_mask,
    draw_questions,
    handwritten_digits,
    paint,
    photographs,
    shape_mask,
)

SIDE = 64  # pixels, height and width of a frame
MOMENTS = 8  # of two equal frames each
FPS = 2  # frames a second
CELL = SIDE / GRID  # pixels, side of a cell
SIZES = {"digit": (16, 20), "shape": (13, 18)}  # pixels, sides of the smallest and of the largest
NEW = 3  # digits that appear
DIRECTIONS = {
    "top": (-1, 0),
    "bottom": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
    "top left": (-1, -1),
    "top right": (-1, 1),
    "bottom left": (1, -1),
    "bottom right": (1, 1),
}  # -> rows and columns
MOST = 16  # different questions that every clip has


@dataclass(frozen=True)
class ClipObject:
    """One digit or shape of a clip."""

    role: str  # "moves", "still" or "new"
    name: str  # one of scenes.NAMES
    color: str  # one of scenes.COLOR_NAMES
    cells: tuple[int, int]  # at the first and at the last moment that show it; PLACES[cell] in words
    first: int  # moment that shows it first
    last: int  # and last

    def __str__(self):
        return f"{self.color} {self.name}"

    @property
    def place(self):
        """Where it is at last, such as "top left"."""
        return PLACES[self.cells[1]]

    @property
    def direction(self):
        """Where it moves, one of DIRECTIONS; None where it does not."""
        way = [np.sign(b - a) for a, b in zip(*(divmod(cell, GRID) for cell in self.cells))]
        return next((name for name, step in DIRECTIONS.items() if step == tuple(way)), None)


@dataclass(frozen=True)
class Clip:
    """A rendered clip with all that is known about it."""

    pixels: np.ndarray  # (8, 64, 64, 3) uint8, RGB: one picture per moment
    objects: tuple[ClipObject, ...]  # the one that moves, the one that never changes, then in the order they appear
    owner: np.ndarray  # (8, 64, 64) uint8: 0 background, 1 + i where object i is painted

    @property
    def frames(self):
        """(16, 64, 64, 3) uint8: every moment twice."""
        return self.pixels.repeat(2, axis=0)


class ClipRenderer:
    """Renders clips of one split; `renderer[index]` costs a few milliseconds.

    Args:
        split: one of scenes.SPLITS.
        seed: any integer; another seed gives other clips of the same digits and photographs.
    """

    def __init__(self, split="test", seed=0):
        self.split, self.seed = split, seed
        self.photos = photographs(split)
        self.digits = handwritten_digits(split)

    def rng(self, purpose, index):
        """A `random.Random` that depends only on (split, seed, purpose, index)."""
        return random.Random(f"clip/{self.split}/{self.seed}/{purpose}/{index}")

    def __getitem__(self, index):
        """Clip number `index` (any integer from 0 on)."""
        rng = self.rng("background", index)
        still, noise = (part[:SIDE, :SIDE] for part in background(self.photos, rng))
        flicker = np.random.RandomState(rng.getrandbits(32)).randn(MOMENTS, SIDE, SIDE, 1) * rng.uniform(0, 3)
        canvas = np.repeat(still[None], MOMENTS, 0)
        owner = np.zeros((MOMENTS, SIDE, SIDE), np.uint8)
        rng = self.rng("objects", index)
        objects = _script(rng)
        for i in (*range(1, len(objects)), 0):  # what moves lies above the others
            self._draw(canvas, owner, i, objects[i], rng)
        pixels = np.clip(canvas + noise + flicker.astype(np.float32), 0, 255).astype(np.uint8)
        return Clip(pixels, objects, owner)

    def _draw(self, canvas, owner, number, o, rng):
        if o.name in DIGITS:
            mask = digit_mask(rng.choice(self.digits[int(o.name)]), rng, SIZES["digit"])
        else:
            mask = shape_mask(o.name, rng, SIZES["shape"])
        rgb = [c + rng.uniform(-18, 18) for c in COLORS[o.color]]
        side, jitter = len(mask), [rng.uniform(-1.5, 1.5) for _ in range(2)]
        start, end = (np.array([cell % GRID + 0.5, cell // GRID + 0.5]) * CELL + jitter for cell in o.cells)
        for moment in range(o.first, o.last + 1):
            center = start + (end - start) * (moment - o.first) / max(1, o.last - o.first)
            left, top = (int(np.clip(c - side / 2, 1, SIDE - side - 1)) for c in center)
            paint(canvas[moment], mask, left, top, rgb)
            owner[moment, top : top + side, left : left + side][mask > 100] = number + 1


def _script(rng):
    """The objects of a clip: who they are, where and when."""
    (down, right), length = rng.choice(list(DIRECTIONS.values())), rng.choice((1, 2))
    starts = [
        (row, col)
        for row in range(GRID)
        for col in range(GRID)
        if 0 <= row + down * length < GRID and 0 <= col + right * length < GRID
    ]
    row, col = rng.choice(starts)
    path = [(row + down * i) * GRID + col + right * i for i in range(length + 1)]
    free = [cell for cell in range(GRID * GRID) if cell not in path]
    at = rng.sample(free, 1 + NEW)
    new = rng.sample(DIGITS, NEW)
    moves, still = rng.sample([name for name in NAMES if name not in new], 2)
    moments = sorted(rng.sample(range(1, MOMENTS - 1), NEW))
    vanishes = rng.randrange(NEW)
    colors = [rng.choice(COLOR_NAMES) for _ in range(2 + NEW)]
    end = MOMENTS - 1
    objects = [
        ClipObject("moves", moves, colors[0], (path[0], path[-1]), 0, end),
        ClipObject("still", still, colors[1], (at[0], at[0]), 0, end),
    ]
    for i, moment in enumerate(moments):
        last = moment if i == vanishes else end
        objects.append(ClipObject("new", new[i], colors[2 + i], (at[1 + i], at[1 + i]), moment, last))
    return tuple(objects)


# ---------------------------------------------------------------------------------------------------- questions
# Each function takes the objects and a random generator and returns (question, answer).


def _moves(objects, rng):
    return rng.choice(("what moves ?", "which object moves ?")), str(objects[0])


def _color(objects, rng):
    if rng.random() < 0.5:
        return rng.choice(("what color is the object that moves ?", "which color moves ?")), objects[0].color
    return rng.choice(("what color never changes ?", "which color never changes ?")), objects[1].color


def _direction(objects, rng):
    o = objects[0]
    return f"where does {rng.choice(('it', f'the {o.name}', f'the {o}'))} move ?", o.direction


def _end(objects, rng):
    o = objects[0]
    return f"where is the {rng.choice((o.name, str(o)))} at the end ?", o.place


def _still(objects, rng):
    return rng.choice(("what never changes ?", "which object never changes ?")), str(objects[1])


def _order(objects, rng):
    new = objects[2:]
    i = rng.randrange(NEW)
    if i == 0 or rng.random() < 0.3:
        word, o = rng.choice((("first", new[0]), ("last", new[-1])))
        return rng.choice(("what appears {} ?", "which digit appears {} ?")).format(word), str(o)
    earlier = new[i - 1]
    return f"what appears after the {rng.choice((earlier.name, str(earlier)))} ?", str(new[i])


def _place(objects, rng):
    o = rng.choice(objects[2:])
    return f"where does the {rng.choice((o.name, str(o)))} appear ?", o.place


def _flash(objects, rng):
    (o,) = (o for o in objects if o.first == o.last)
    return rng.choice(("what vanishes ?", "which digit vanishes ?", "what is there only once ?")), str(o)


def _list(objects, rng):
    text = rng.choice(("list the digits that appear .", "read the digits that appear .", "which digits appear ?"))
    return text, " ".join(o.name for o in objects[2:])


QUESTIONS = {  # type -> (relative frequency, function)
    "moves": (1.5, _moves),
    "color": (1.0, _color),
    "direction": (1.5, _direction),
    "end": (1.5, _end),
    "still": (1.5, _still),
    "order": (2.5, _order),
    "place": (2.0, _place),
    "flash": (1.5, _flash),
    "list": (1.5, _list),
}
QUESTION_TYPES = tuple(QUESTIONS)


def ask(objects, n, rng):
    """`n` different questions about the objects of a clip, at most `MOST`: a list of (type, question, answer).

    Answers are one to three words.
    """
    if not 0 <= n <= MOST:
        raise ValueError(f"questions={n} per clip; choose 0 to {MOST}")
    return draw_questions(QUESTIONS, objects, n, rng)
