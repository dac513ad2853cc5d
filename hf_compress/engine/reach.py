"""How far a vision method reaches into the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_compress.methods.base import TowerMethod, VisionMethod
from hf_compress.patches.base import DEEPEST, Architecture
from hf_compress.signals import EVERY, Read


def reach(method: VisionMethod, depth: int) -> int:
    """How many blocks of a tower a method reads into, from the one whose features the projector reads backwards.

    `depth`: blocks that see the whole image.
    """
    return max((read.at + 1 for read in method.reads(depth) if read.where == "tower" and not read.every), default=0)


def enters(method: VisionMethod, adapter: Architecture, model: nn.Module) -> bool:
    """Whether a method acts inside the tower of a model."""
    return isinstance(method, TowerMethod) and method.inside and bool(adapter.tower_blocks(model, DEEPEST))


def acting(method: VisionMethod, adapter: Architecture, model: nn.Module, inputs: Mapping[str, Any]) -> list[int]:
    """The blocks of a tower in which a method acts: all in front of the features, or those that see whole images."""
    if Read("tower", EVERY, "attention") in method.reads(len(whole := adapter.attention_blocks(model, inputs))):
        return whole
    return list(range(len(adapter.tower_blocks(model, inputs))))
