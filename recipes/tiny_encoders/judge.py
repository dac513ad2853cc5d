"""What trained modules are worth: accuracy on test scenes, beside methods without a module."""

from __future__ import annotations

from typing import Any

import hf_compress
from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate.plan import RATIOS
from hf_compress.evaluate.scoring import answer, exact_match, score


def judge(model: Any, processor: Any, methods: dict[str, str | None], limit: int) -> None:
    """Print the accuracy of each method at `RATIOS` on about `limit` questions; the values of `methods` are weights."""
    rows = load_scenes("test", images=-(-limit // 4), questions=4)
    for name, weights in methods.items():
        line = []
        for ratio in RATIOS:
            given = {} if weights is None else {"weights": weights}
            with hf_compress.compressed(model, name, ratio, **given):
                said = answer(model, processor, rows, batch_size=16, max_new_tokens=8)
            line.append(f"{ratio}: {score(exact_match(said, rows['answer'])).accuracy:.1%}")
        print(f"{name}  {'  '.join(line)}", flush=True)
