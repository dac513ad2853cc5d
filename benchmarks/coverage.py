"""How often the 95 % intervals of `hf_compress.evaluate` hold what they are about, in simulated judgements.

    python benchmarks/coverage.py                       # the table of benchmarks/README.md, some ten minutes
    python benchmarks/coverage.py --sets 1000

A question is answered rightly if its image is easy enough: half of what decides it belongs to the image, the other half
to the question and the method. The control is a mean over three seeds, each of which draws anew. 0.5 and 0.5 are the
chances of method and control to be right, without a difference and with one.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from scipy.stats import norm

from hf_compress.evaluate import difference, interval

SEEDS = 3
IMAGES = (4, 6, 8, 12, 25, 50, 100)
CHANCES = ((0.5, 0.5), (0.7, 0.6), (0.9, 0.8))
QUESTIONS = {"1": (1,), "4": (4,), "10": (10,), "1, 2, 4, 9": (1, 2, 4, 9)}


def judgement(
    rng: np.random.Generator, sizes: np.ndarray, chances: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of method and control per question, and the image of each; `sizes` questions are about each image."""
    image = np.repeat(np.arange(len(sizes)), sizes)
    easy = rng.normal(size=len(sizes))[image] * 0.5**0.5

    def right(chance: float) -> np.ndarray:
        return (easy + rng.normal(size=len(image)) * 0.5**0.5 < norm.ppf(chance)).astype(float)

    return right(chances[0]), np.mean([right(chances[1]) for _ in range(SEEDS)], 0), image


def coverage(images: int, questions: tuple[int, ...], chances: tuple[float, float], sets: int) -> tuple[float, float]:
    """How often the interval of the difference, and that of the method's own mean, hold the truth."""
    rng = np.random.default_rng(0)
    sizes = np.array([questions[i % len(questions)] for i in range(images)])
    held = np.zeros(2)
    for _ in range(sets):
        ours, control, image = judgement(rng, sizes, chances)
        _, low, high = difference(ours.tolist(), control.tolist(), image.tolist())
        _, least, most = interval(ours.tolist(), image.tolist())
        held += low <= chances[0] - chances[1] <= high, least <= chances[0] <= most
    return held[0] / sets, held[1] / sets


def main(sets: Annotated[int, typer.Option(help="Simulated judgements per cell.")] = 4000) -> None:
    """Print a Markdown table: difference / mean, in percent."""
    print(f"| questions per image | right | {' | '.join(f'{n} images' for n in IMAGES)} |")
    print("|---|---|" + "--:|" * len(IMAGES))
    for name, questions in QUESTIONS.items():
        for chances in CHANCES:
            cells = [coverage(n, questions, chances, sets) for n in IMAGES]
            text = " | ".join(f"{100 * a:.1f} / {100 * b:.1f}" for a, b in cells)
            print(f"| {name} | {chances[0]} against {chances[1]} | {text} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
