"""AdaptVision's connector: four neighbours of a row become one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.modules.joined import Joined
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.merge import pool1d

__all__ = ["AdaptVision"]


@register("adaptvision", stage="vision", kind="trained", paper="arXiv:2408.16986", needs={"visual"})
@dataclass
class AdaptVision(VisionMethod):
    """Windows of consecutive tokens, each one trained map of its tokens side by side.

    The projected tokens (n, N, D) are cut into K windows in raster order, as equal as can be; the tokens of each are
    put side by side in `slots` parts (of a window of another size a part is the mean of the tokens that lie in it), and
    one map makes a token of them, in the slot of the middle one. It begins as the mean. Cost O(N * D + K * slots *
    D^2).

    Source: "AdaptVision: Dynamic Input Scaling in MLLMs for Versatile Scene Understanding", arXiv:2408.16986
    (harrytea/AdaptVision), its connector, which joins 4 consecutive tokens of every tile, 1 x 4 rather than 2 x 2; any
    other K is our extension. How many tiles an image gets, by its size and shape, is decided there before the tower;
    here by the processor of the model (`max_pixels`, `max_patches`). There the whole image in small is not joined, and
    tiles are announced by tokens of their own.

    Args:
        slots: parts of a window.

    Raises:
        ValueError: `slots` is no integer of at least 1, or `positions` none of its values.
    """

    slots: int = 4

    needs_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("slots", self.slots)

    def module(self, model: nn.Module) -> nn.Module:
        """The map."""
        return Joined(model.config.get_text_config().hidden_size, self.slots)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The middle tokens of the windows, (n, K)."""
        return Assignment(pool1d(tokens.count, keep, tokens.device)[1].repeat(len(tokens), 1))

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        assert tokens.module is not None
        out: Tensor = tokens.module(tokens.embeddings, assignment.kept.shape[1])
        return out
