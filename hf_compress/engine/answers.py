"""Whether what a method answers can be carried out as it stands: nothing behind asks again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_compress.signals import Assignment


def check_answer(answer: Any, name: str, size: tuple[int, int], keep: int | None, *, at_most: bool = False) -> None:
    """Raises ValueError where an answer is not what was asked for, or names tokens that are not there, or one twice.

    Args:
        name: of the method.
        size: (n, N), sequences and tokens in each.
        keep: how many of each stay; None: the method decides. `at_most`: or fewer.
    """
    check_shape(answer, name, size, keep, at_most=at_most)
    if answer.kept.numel() and not bool(_sound(answer, size[1], None if at_most else keep)):
        exactly = "" if keep is None or at_most else f", {keep} of each sequence"
        raise ValueError(
            f"method={name!r} answered kept (or groups) with numbers that do not go together: kept are indices below "
            f"{size[1]}, each once{exactly}; groups are outputs below {answer.kept.shape[1]}, or -1"
        )


def check_shape(
    answer: Any, name: str, size: tuple[int, int], keep: int | None = None, *, at_most: bool = False
) -> None:
    """The same without a look at the numbers, for which the device would be waited for."""
    if not isinstance(answer, Assignment):
        raise ValueError(f"method={name!r} answered with {type(answer).__name__}; an Assignment is wanted")
    (n, tokens), kept, valid = size, answer.kept, answer.valid
    found = tuple(kept.shape)
    met = keep is None or found[1:] == (keep,) or (at_most and found[1:] < (keep,))
    if found[:1] != (n,) or len(found) != 2 or not met or (valid is not None and valid.shape != found):
        raise ValueError(
            f"method={name!r} answered kept of shape {found} for {n} sequences of {tokens} tokens that keep "
            f"{'what it decides' if keep is None else keep}; kept (and valid) are (n, K) of token indices"
        )
    if kept.dtype != torch.int64:
        raise ValueError(f"method={name!r} answered kept of {kept.dtype}; token indices are torch.int64")
    wanted = {"groups": (n, tokens), "weight": (n, tokens), "dense": (*found, tokens)}
    for part, shape in wanted.items():
        given = getattr(answer, part)
        if given is not None and given.shape != shape:
            raise ValueError(f"method={name!r} answered {part} of shape {tuple(given.shape)}; it must be {shape}")


@torch.no_grad()
def _sound(answer: Assignment, tokens: int, keep: int | None) -> Tensor:
    """() bool, in one look at the device."""
    kept, valid, groups = answer.kept, answer.valid, answer.groups
    real = torch.ones_like(kept) if valid is None else valid.long()
    times = real.new_zeros(len(real), tokens).scatter_add(1, kept.clamp(0, tokens - 1), real)
    sound = (kept >= 0).all() & (kept < tokens).all() & (times <= 1).all()
    if keep is not None and valid is not None:
        sound = sound & (real.sum(1) == keep).all()
    if groups is not None:
        sound = sound & (groups >= -1).all() & (groups < kept.shape[1]).all()
    return sound
