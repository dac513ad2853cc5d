"""DyVTE: visual tokens leave all at once, as soon as a router says that text needs them no more (arXiv:2411.19628)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_compress.methods.base import DecoderMethod, check_count, check_number
from hf_compress.methods.question import behind_images
from hf_compress.registry import register
from hf_compress.signals import Assignment, DecoderView

WIDTH = 2048


@register("dyvte", stage="decoder", kind="dropping", paper="arXiv:2411.19628", needs={"visual"})
@dataclass
class DyVTE(DecoderMethod):
    """All visual rows of a sample leave together before one layer.

    With `ratio="adaptive"` a router says before which. Behind every layer but the last it reads (B, 2 D): the mean of
    the rows of text behind the last image without the last row of the prompt, and that last row; a linear map without
    bias, GELU and another one give two numbers, and the visual rows go where the second, plus `bias`, is the larger.
    Samples of a batch leave each at its own layer. Routers are trained while the model is frozen, to tell where what is
    said without visual rows is what is said with them (`recipes/exit`); before that they are refused.

    With a ratio there is no router: of T layers the first floor((1 - ratio) T) see all V rows, and where that is no
    whole number the next one sees the rest of the budget, the rows that the last one of the prompt attends to most. The
    authors have whole layers only.

    On the built-in LLaVA routers that have seen 120 answers (`recipes/exit`, three minutes on a busy core) remove 37,
    45 and 54 % at a bias of -2, 0 and 2, and 98, 93 and 83 % of 40 answers are right (all tokens: 100 %).
    Ranked tokens at the same budget lose less there: its answers need the image up to the last layers.

    Source: Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings,
    NeurIPS 2025, arXiv:2411.19628 (DoubtedSteam/DyVTE). Cost: a small MLP per layer.

    Args:
        bias: what is added in favour of leaving.
        width: channels of a router; default 2048, but no more than the model has.

    Raises:
        ValueError: a knob is none of its values, or the ratio would leave no visual row before the first layer.
    """

    bias: float = 0.0
    width: int | None = None

    adaptive: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True
    counts_only: ClassVar[bool] = True
    example = {"ratio": 0.4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bias", self.bias, -1e4, 1e4)
        if self.width is not None:
            check_count("width", self.width)

    def module(self, model: nn.Module) -> nn.Module:
        """A router behind each layer but the last."""
        config = model.config.get_text_config()
        size, width = config.hidden_size, self.width or min(WIDTH, config.hidden_size)
        return nn.ModuleList(router(size, width) for _ in range(config.num_hidden_layers - 1))

    def plan(self, layers: int, tokens: int, ratio: Fraction) -> dict[int, int]:
        through = round(layers * tokens * (1 - ratio))
        whole, rest = divmod(through, tokens) if tokens else (layers, 0)
        if not whole:
            raise ValueError(
                f"ratio={float(ratio):.4g}: visual rows go through one layer of {layers} at least; reachable is 0 <= "
                f"ratio <= {float(1 - Fraction(1, layers)):.4g}"
            )
        cuts = {whole: rest, whole + 1: 0} if rest else {whole: 0}
        return {layer: n for layer, n in cuts.items() if layer < layers}

    def removable(self, view: DecoderView) -> Tensor:
        return view.visual & ~view.speaks

    def decide(self, view: DecoderView, keep: list[int] | None) -> Assignment | None:
        if keep is not None:
            return super().decide(view, keep)
        if not bool(view.removable.any()):
            return None
        if not isinstance(view.module, nn.ModuleList):
            raise ValueError("ratio='adaptive': dyvte was compressed with a ratio, without routers; compress anew")
        stay, leave = view.module[view.layer - 1](summary(view)).float().unbind(-1)
        leaves = leave + self.bias > stay
        return Assignment.selection(view.valid & ~(view.removable & leaves[:, None])) if bool(leaves.any()) else None


def router(size: int, width: int) -> nn.Module:
    """(B, 2 size) to (B, 2)."""
    return nn.Sequential(nn.Linear(2 * size, width, bias=False), nn.GELU(), nn.Linear(width, 2, bias=False))


def summary(view: DecoderView) -> Tensor:
    """(B, 2 D): the mean of the text behind the last image, its last row apart (that row where it is alone), and it."""
    last = view.prompt & (view.last == 0)
    text = behind_images(view) & ~last
    text = torch.where(text.any(1, keepdim=True), text, last)
    means = [(view.hidden * rows[..., None]).sum(1) / rows.sum(1, keepdim=True).clamp(min=1) for rows in (text, last)]
    return torch.cat(means, -1).to(view.hidden.dtype)
