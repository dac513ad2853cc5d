"""Thresholds of cosine above which tokens merge in the blocks of a vision tower (DyMU)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_compress import budget
from hf_compress.calibrate.files import MERGING, place, reading, save, tower_identity
from hf_compress.config import plain
from hf_compress.engine.inputs import check_pixels
from hf_compress.engine.reduce import TowerReducer
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.state import State
from hf_compress.engine.tower import TowerRecorder
from hf_compress.methods.vision.tome import ToMe, share
from hf_compress.patches.base import DEEPEST
from hf_compress.patches.registry import adapter_for
from hf_compress.signals import Assignment, Block
from hf_compress.tensors.merge import proposals


@torch.no_grad()
def merge_thresholds(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    ratio: float,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The cosine of every block above which as many proposals merge as remove `ratio` of all tokens, over the images.

    The tower runs over each batch once, as under `tome` with this ratio. In each block the proposals of all images of
    a batch are sorted; the threshold is the first that does not merge if the strongest do, as many of them as `tome`
    merges there. Thresholds are means over the batches, never below 0. What the ratio of an image becomes with them
    follows the image; over images like those that were measured its mean comes near to `ratio`.

    Source: DyMU, arXiv:2504.17040, which lets the images of a batch go on as the threshold says; here each goes on with
    as many tokens as the others, so that they still run side by side.

    Args:
        model: a model that is not compressed, whose vision tower can be entered.
        batches: what the processor gives, of some hundred images in all: `pixel_values` and what comes with them (all
            else is left alone). Large batches measure better.
        ratio: fraction of the visual tokens that is to go on average.
        path: file to write; None: "merge_thresholds.json" in the folder that the model was loaded from.
        progress: show a progress bar.

    Returns:
        what was written: "thresholds" per block, "ratio", and the number of "batches".

    Raises:
        ValueError: the model is compressed, its tower cannot be entered, there is no batch, one holds no pixels or no
            normalised ones, the tower makes no numbers of them, there is no place to write to, or the ratio is none.
    """
    exact, adapter = budget.check_ratio(plain(ratio)), adapter_for(model)
    file, state = place(model, MERGING, path, knob="thresholds_file"), State()
    if not adapter.tower_blocks(model, DEEPEST):
        raise ValueError(f"model={type(model).__name__}: its vision tower cannot be entered, so nothing merges there")
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise ValueError(f"batches={type(batches).__name__} must be a list of what the processor gives")
    sums: list[float] = []
    count = 0
    with reading(model) as log:
        method = _Measured(where="tower")
        stage = Budgeted("merge_thresholds", method, exact, None)
        TowerRecorder(model, adapter, state, stage).install(log)
        TowerReducer(model, adapter, state, stage).install(log)
        for batch in tqdm(batches, desc="merge thresholds", unit="batch", disable=not progress):
            method.start()
            model.base_model.get_image_features(**_images(model, batch, count))
            if any(bool(edge.isnan().any()) for edges in method.edges for edge in edges):
                raise ValueError(
                    f"batches[{count}]: the tower of {type(model).__name__} makes NaN of its pixels; leave them out, "
                    "or load the model in a dtype of a larger range"
                )
            found = [threshold(edges, n) for edges, n in zip(method.edges, method.merged)]
            sums = [a + b for a, b in zip(sums, found)] if count else found
            count += 1
    if not count:
        raise ValueError("batches: there is none; pass what the processor gives for some images")
    thresholds = [max(0.0, total / count) for total in sums]
    data = {"thresholds": thresholds, "ratio": float(exact), "batches": count}
    return save(model, file, data, tower_identity)


def _images(model: nn.Module, batch: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What of a batch the tower takes."""
    known = inspect.signature(model.base_model.get_image_features).parameters.values()
    given = {p.name: batch[p.name] for p in known if isinstance(batch, Mapping) and p.name in batch}
    needed = [p.name for p in known if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if lacking := [name for name in needed if given.get(name) is None]:
        raise ValueError(f"batches[{number}] holds no {' and no '.join(lacking)}; pass what the processor gives")
    check_pixels(model, given)
    return given


@dataclass
class _Measured(ToMe):
    """ToMe that notes what is proposed in each block, and how much of it merges."""

    def start(self) -> None:
        """Forget what was noted."""
        self.edges: list[list[Tensor]] = []
        self.merged: list[int] = []

    def reduce(self, block: Block, keep: int) -> Assignment | None:
        n, m = block.hidden.shape[:2]
        if block.index == len(self.edges):
            self.edges.append([])
            self.merged.append(0)
        self.edges[block.index].append(proposals(block.keys, block.has_cls)[0].flatten())
        self.merged[block.index] += n * share(m - block.has_cls, keep, block.steps - block.index)
        return super().reduce(block, keep)


def threshold(edges: list[Tensor], merged: int) -> float:
    """The first of all `edges`, in falling order, that does not merge if the strongest `merged` do; at most -1."""
    ordered = torch.cat(edges).sort(descending=True).values
    return float(ordered[merged]) if merged < len(ordered) else -1.0
