"""How many visual rows each layer of a language model needs: a search (G-Search), and a fit (FitPrune)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_compress import budget, registry
from hf_compress.api import bare, compressed
from hf_compress.checks import check_stages
from hf_compress.config import CompressionConfig, Schedule
from hf_compress.engine.runtime import Compression
from hf_compress.engine.stage import Budgeted
from hf_compress.methods.base import check_number
from hf_compress.methods.decoder.fitprune import FitPrune, attended, tolerance
from hf_compress.patches.registry import adapter_for
from hf_compress.signals import DecoderView

ALL = 2**31 - 1  # more rows than any image has


@torch.no_grad()
def row_schedule(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    agreement: float = 1.0,
    method: str = "gsearch",
    progress: bool = True,
    **knobs: Any,
) -> Schedule:
    """The fewest visual rows of every layer with which a model goes on answering as it does uncompressed.

    From the first layer that may be cut on, each layer and all behind it take the smallest number of rows with which
    the most probable token behind the prompt is that of the uncompressed model in `agreement` of the prompts. The
    number is found by bisection, as if more rows never agreed less: layers * log2(V) passes over the batches for images
    of V tokens.

    Source: G-Search of arXiv:2412.00556, whose quality is a task score or the agreement with the full model, and which
    searches each layer by Bayesian optimisation.

    Args:
        model: a model that is not compressed.
        batches: what it is called with, without labels: prompts of the task at hand, padded on either side.
        agreement: the share of prompts, above 0 and at most 1.
        method: of the decoder stage; knobs: its own arguments.
        progress: show a progress bar.

    Returns:
        the schedule, for `compress(method, schedule=...)`: rows per image, falling.

    Raises:
        ValueError: the model is compressed, there is no batch, one shows no image, or the method takes no schedule of
            rows.
    """
    check_number("agreement", agreement, 0, 1, above=True)
    if registry.get(method).stage != "decoder":
        raise ValueError(f"method={method!r} must be one of {sorted(registry.methods('decoder'))}")
    _check_batches(bare(model), batches)
    adapter = adapter_for(bare(model))
    layers, first = len(adapter.layers(adapter.decoder(bare(model)))), adapter.min_drop_layer(bare(model))
    with compressed(model, method, schedule=Schedule((ALL,) * layers, "rows"), **knobs):
        compression: Any = bare(model).compression
        wanted, most = [], 0
        for number, batch in enumerate(batches):
            wanted.append(_answers(model, batch))
            most = max(most, *_images(compression, number))

        may_differ = int(sum(map(len, wanted)) * (1 - agreement) + 1e-9)

        def good(levels: list[int]) -> bool:
            compression.reschedule(Schedule(tuple(levels), "rows"))
            differ = 0
            for batch, answers in zip(batches, wanted):
                differ += int((_answers(model, batch) != answers).sum())
                if differ > may_differ:
                    return False
            return True

        return Schedule(tuple(_search([most] * layers, first, good, progress)), "rows")


def _search(levels: list[int], first: int, good: Callable[[list[int]], bool], progress: bool) -> list[int]:
    """Levels lowered one layer after the other, from the `first` on, with all behind it, while they stay `good`."""
    layers = len(levels)
    for layer in tqdm(range(first, layers), desc="row schedule", unit="layer", disable=not progress):
        low, high = 1, levels[layer]
        while low < high:
            middle = (low + high) // 2
            if good(levels[:layer] + [middle] * (layers - layer)):
                high = middle
            else:
                low = middle + 1
        levels[layer:] = [high] * (layers - layer)
    return levels


def _answers(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """(B,) the most probable token behind each prompt."""
    logits = model(**batch).logits
    mask = batch.get("attention_mask")
    if mask is None:
        return logits[:, -1].argmax(-1)
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1).to(logits.device)
    return logits[torch.arange(len(last), device=last.device), last].argmax(-1)


@torch.no_grad()
def fitted_schedule(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], *, ratio: float, layer: int = 1, progress: bool = True
) -> Schedule:
    """Rows of every layer for `fitprune`: as few as keep the attention that visual rows receive, as far as possible.

    A visual row may go behind a layer if it is, by what text attends to and by what visual rows attend to there, among
    the lowest that together have at most alpha of the sum (`methods.decoder.fitprune.tolerance`), and what may go once
    is gone from there on. Counts are means over all images; alpha is the one with which their mean over layers comes
    nearest to `ratio`. One pass over the batches, in which nothing goes: the release prunes while it fits, and so runs
    the model once per trial of alpha.

    Source: FitPrune, arXiv:2409.10197.

    Args:
        model: a model that is not compressed.
        batches: what it is called with: some prompts with images (the paper takes 655), padded on either side.
        ratio: fraction of the visual rows that is to go, averaged over layers.
        layer: the first that may be cut.
        progress: show a progress bar.

    Returns:
        the schedule, for `compress("fitprune", schedule=...)`: rows per image, falling.

    Raises:
        ValueError: the model is compressed, there is no batch, one shows no image, or the ratio is none, or out of
            reach.
    """
    exact, model = budget.check_ratio(ratio), bare(model)
    _check_batches(model, batches)
    adapter, method = adapter_for(model), _Measured(layer=layer)
    layers = len(adapter.layers(adapter.decoder(model)))
    FitPrune(layer=layer).plan(layers, 1000, exact)
    stage = Budgeted("fitprune", method, None, None)
    check_stages(model, adapter, {"decoder": stage})
    compression = Compression(model, adapter, {"decoder": stage}, CompressionConfig([]))
    compression.install()
    images: list[int] = []
    try:
        for number, batch in enumerate(tqdm(batches, desc="fit", unit="batch", disable=not progress)):
            model(**batch)
            images += _images(compression, number)
    finally:
        compression.uninstall()
    fitted = {i: torch.cat(found) for i, found in method.tolerances.items()}

    def levels(knob: Fraction) -> list[int]:
        """With a tolerance of 1 - knob."""
        kept = [int((found > float(1 - knob)).sum()) for found in fitted.values()]
        return [max(images)] * layer + [max(1, round(n / len(images))) for n in kept]

    target = layers * Fraction(sum(images), len(images)) * (1 - exact)
    spare = layer * (max(images) - Fraction(sum(images), len(images)))  # of images that are smaller than the largest
    return Schedule(
        tuple(levels(budget.solve(lambda k: sum(levels(k)), target + spare, Fraction(0), Fraction(1)))), "rows"
    )


@dataclass
class _Measured(FitPrune):
    """Notes from which tolerance on each row may be gone, and lets all of them go on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tolerances: dict[int, list[Tensor]] = {}

    def decide(self, view: DecoderView, keep: list[int] | None) -> None:
        text, image = attended(view)
        least = view.memory.get("least", torch.full_like(text, torch.inf, dtype=torch.float64))
        for b, rows in enumerate(view.removable):
            if bool(rows.any()):
                least[b, rows] = least[b, rows].minimum(tolerance(text[b, rows], image[b, rows]))
                self.tolerances.setdefault(view.layer, []).append(least[b, rows].cpu())
        view.memory["least"] = least


def _check_batches(model: Any, batches: Any) -> None:
    """Raises ValueError where there is nothing to measure on, or a compressed model to measure."""
    if getattr(model, "compression", None) is not None:
        raise ValueError("model is compressed; measure the bare model: call model.decompress() first")
    if isinstance(batches, Mapping) or not isinstance(batches, Sequence) or not batches:
        raise ValueError(f"batches={type(batches).__name__} must be a list of what the model is called with")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(f"batches[{number}]={batch!r:.80} must be what the model is called with, by name")


def _images(compression: Compression, number: int) -> list[int]:
    """Visual rows of every image of the last batch; raises ValueError if there was none."""
    assert compression.last is not None
    if not (found := [n for sample in compression.last.visual_tokens for n in sample]):
        raise ValueError(f"batches[{number}] shows no image")
    return found
