"""The vision stage: from one run of the tower to kept tokens per crop."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress import budget, registry
from hf_compress.engine.answers import check_answer
from hf_compress.engine.encoded import Choice, Encoded, Setting
from hf_compress.engine.reach import reach
from hf_compress.engine.stage import Budgeted
from hf_compress.engine.tokens import STATES, UnitTokens
from hf_compress.methods.base import TowerMethod, VisionMethod
from hf_compress.patches.base import AS_CONFIGURED, Architecture
from hf_compress.signals import EVERY, Assignment, Read
from hf_compress.tensors.ambient import own_precision
from hf_compress.tensors.select import identity


def check_tower(stage: Budgeted, adapter: Architecture, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError where the tower of a call has too few blocks in front of its features for the method or budget.

    So it does where the method reads what no tower has.

    Args:
        inputs: arguments of the call that encodes; none: as the config says.
    """
    method, usable = stage.method, len(adapter.attention_blocks(model, inputs))
    inside = {Read("tower", EVERY, "attention")} if isinstance(method, TowerMethod) else set()
    for read in method.reads(usable) - inside:
        if read.where == "tower" and (read.at < 0 or read.what not in ("attention", *STATES)):
            known = f"blocks from 0 on, 'attention' or one of {STATES}"
            raise ValueError(f"method={stage.name!r} reads {read}; of a tower there are {known}")
    if (blocks := reach(method, usable)) > usable:
        others = [s.name for s in registry.methods("vision").values() if "cls" not in s.needs]
        raise ValueError(
            f"method={stage.name!r} reads {blocks} blocks of the vision tower; {type(model).__name__} has "
            f"{usable} that see the whole image in front of its features; "
            + (f"set the knob to at most {usable}" if usable else f"use one of {others}")
        )
    if stage.open or (fixed := known_tokens(adapter, model, stage)) is None:
        return
    grid = adapter.grid(model, fixed, AS_CONFIGURED) or (1, fixed)
    try:
        method.check(grid, image_budget(fixed, stage.ratio, stage.keep))
    except ValueError as error:
        if stage.ratio is None:
            raise
        raise ValueError(f"ratio={float(stage.ratio):.4g} of {fixed} visual tokens: {error}") from error


def known_tokens(adapter: Architecture, model: nn.Module, *stages: Budgeted) -> int | None:
    """Tokens of every image where they are known before it is seen; a picture of tiles, which share a `keep`, has any
    number of them."""
    if "visual" not in adapter.gives or (adapter.tiles and any(stage.keep is not None for stage in stages)):
        return None
    return adapter.tokens_per_image(model)


def image_budget(tokens: int, ratio: Fraction | None, keep: int | None) -> int:
    """Tokens that an image of `tokens` keeps; an image smaller than `keep` stays whole."""
    return budget.kept(tokens, ratio) if ratio is not None else min(tokens, keep or tokens)


def crop_budgets(images: Sequence[Sequence[int]], ratio: Fraction | None, keep: int | None) -> list[list[int | None]]:
    """Tokens that stay of the crops of each image, from the tokens that they have: its exact budget is shared over them
    in proportion. None where the method decides."""

    @functools.cache  # images of one shape share theirs alike
    def shares(crops: tuple[int, ...]) -> list[int]:
        return budget.shares(image_budget(sum(crops), ratio, keep), [float(n) for n in crops], list(crops))

    if ratio is None and keep is None:
        return [[None] * len(crops) for crops in images]
    return [list(shares(tuple(crops))) for crops in images]


def unit_budgets(encoded: Encoded, ratio: Fraction | None, keep: int | None) -> Sequence[int | None]:
    """Tokens that stay of every unit, see `crop_budgets`."""
    sizes: list[list[int]] = [[] for _ in encoded.images]
    for unit, size in zip(encoded.units, encoded.sizes):
        sizes[unit.image].append(size)
    parts = [iter(crops) for crops in crop_budgets(sizes, ratio, keep)]
    return [next(parts[unit.image]) for unit in encoded.units]


def sequences(encoded: Encoded, setting: Setting, scope: str) -> list[list[int]]:
    """The units that are decided on together: see `VisionMethod.scope`."""
    together: dict[Any, list[int]] = {}
    for i, unit in enumerate(encoded.units):
        if scope == "sample":
            key: Any = setting.samples[unit.image]
        else:
            key = unit.image if scope == encoded.modality else (i,)
        together.setdefault(key, []).append(i)
    return list(together.values())


def decide(
    stage: Budgeted, adapter: Architecture, model: nn.Module, encoded: Encoded, setting: Setting
) -> list[Choice]:
    """The decision for every unit: taken once per run of the tower, in batches of equal crops, without gradient.

    Where the question is read it is taken anew for another one; for every forward where the method makes vectors, or
    reads the language model.
    Vectors that are merged or made are computed with gradient.
    """
    if encoded.decision is not None and encoded.asked == setting.question:
        return encoded.decision
    if encoded.call is not None and encoded.call.fixed is not None:
        fixed = [encoded.call.fixed[unit.crop] for unit in encoded.units]
        encoded.decision = [Choice([i], mine.kept, owners=mine.owners) for i, mine in enumerate(fixed)]
        return encoded.decision
    groups: dict[Any, list[list[int]]] = {}
    budgets = unit_budgets(encoded, stage.ratio, stage.keep)
    for members in sequences(encoded, setting, stage.method.scope):
        units = [encoded.units[i] for i in members]
        shape = [(len(unit.rows), unit.grid, unit.box, unit.pooled) for unit in units]
        counts = [budgets[i] for i in members]
        keep = None if None in counts else sum(n for n in counts if n)
        groups.setdefault((tuple(shape), keep), []).append(members)
    decision, lasts = [], setting.looks is None  # the same text may say something else in another prompt
    for (shape, keep), alike in groups.items():
        first = [members[0] for members in alike]
        noted = {}
        if type(stage.method).note is not VisionMethod.note:
            noted = _note(stage, UnitTokens(stage, adapter, model, encoded, setting, alike))
        if keep in (0, sum(size for size, *_ in shape)):
            whole = identity(len(first), keep, encoded.units[first[0]].rows.device)
            decision.append(Choice(first, whole, noted=noted))
            continue
        tokens = UnitTokens(stage, adapter, model, encoded, setting, alike)
        with torch.no_grad():
            assignment = own_precision(stage.method.assign)(tokens, keep)
        check_answer(assignment, stage.name, (len(tokens), tokens.count), keep, at_most=stage.method.at_most)
        made = make(stage, tokens, assignment)
        mixed, vectors, told = made or (*merge(assignment, tokens, adapter, model), None)
        kept, owners = assignment.kept, assignment.owners
        decision.append(Choice(first, kept, mixed, vectors, assignment.valid, owners, noted, told))
        lasts = lasts and not made  # the next forward may find other weights
    if lasts and not any(choice.vectors is not None and choice.vectors.requires_grad for choice in decision):
        encoded.decision, encoded.asked = decision, setting.question  # one with a graph belongs to this forward alone
    return decision


@own_precision
@torch.no_grad()
def _note(stage: Budgeted, tokens: Any) -> dict[str, Tensor]:
    """What a method tells of the tokens it is shown; raises ValueError where that is not one number per token."""
    noted: dict[str, Tensor] = stage.method.note(tokens)
    for name, told in noted.items():
        if told.shape != (len(tokens), tokens.count):
            raise ValueError(
                f"method={stage.name!r} notes {name!r} of shape {tuple(told.shape)}; it must be (n, N) = "
                f"{(len(tokens), tokens.count)}"
            )
    return noted


def make(stage: Budgeted, tokens: Any, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor | None] | tuple[()]:
    """(n, K) bool outputs, their vectors, which the method itself makes, and what it tells the text behind.

    Args:
        tokens: what it was shown.

    Raises:
        ValueError: they are not one per kept token (and one per token of text), as wide as the embeddings.
    """
    if (vectors := stage.method.make(tokens, assignment)) is None:
        return ()
    vectors, told = vectors if isinstance(vectors, tuple) else (vectors, None)
    kept, width = assignment.kept, tokens.embeddings.shape[-1]
    if told is not None and told.shape != (wanted := tokens.question[0].shape):
        raise ValueError(
            f"method={stage.name!r} tells text vectors of shape {tuple(told.shape)}; `make` must give one per token of "
            f"`tokens.question`, (n, T, D) = {tuple(wanted)}"
        )
    if vectors.shape != (*kept.shape, width):
        raise ValueError(
            f"method={stage.name!r} made vectors of shape {tuple(vectors.shape)}; `make` must give one per kept token, "
            f"(n, K, D) = {(*kept.shape, width)}"
        )
    real = torch.ones_like(kept, dtype=torch.bool) if assignment.valid is None else assignment.valid
    return real, vectors[real], told


def merge(
    assignment: Assignment, tokens: UnitTokens, adapter: Architecture, model: nn.Module
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`mixed` and `vectors` of a `Choice`: tokens that stay as they are stand in the prompt already."""
    if not assignment.merges:
        return None, None
    mixed = assignment.mixed
    if tokens.pooled or not assignment.before_projector:
        return mixed, mix(assignment, tokens.embeddings, mixed)
    return mixed, adapter.project(model, mix(assignment, tokens.features, mixed))


@own_precision
def mix(assignment: Assignment, x: Tensor, mixed: Tensor) -> Tensor:
    """(m, D): the outputs of (n, N, D) tokens that are `mixed`, those of all images in a row."""
    groups, weight, most = assignment.groups, assignment.weight, int(mixed.sum(1).max())
    if groups is None or weight is None or most > x.shape[-1]:  # then `share` would be larger than the tokens
        return assignment.apply(x)[mixed]
    outputs = mixed.argsort(dim=1, descending=True, stable=True)[:, :most]  # the mixed ones come first
    share = (groups[:, None] == outputs[..., None]) * weight[:, None].float()
    return (share @ x.float()).to(x.dtype)[mixed.gather(1, outputs)]
