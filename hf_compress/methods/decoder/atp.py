"""ATP-LLaVA: thresholds that follow from each prompt say how many visual tokens stay (arXiv:2412.00447)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_compress.methods.base import Part, VisionMethod, check_count, check_number
from hf_compress.methods.decoder.pyramiddrop import PyramidDrop
from hf_compress.methods.question import behind_images
from hf_compress.registry import register
from hf_compress.signals import Assignment, DecoderView, Tokens
from hf_compress.tensors.rows import best_rows

STEEP = 10.0  # of the soft masks that training counts with
DEEP, FAR = 0.05, 0.2  # what rows in deep layers, and counts off the target, add to the loss
BEGIN = (-6.0, -2.0)  # where the thresholds begin, before the sigmoid: .0025 and .12


@register("atp", stage="decoder", kind="dropping", paper="arXiv:2412.00447", needs={"visual"})
@dataclass
class ATP(PyramidDrop):
    """Three cuts by what visual rows and text attend to; a coarse grid of the image stays in any case, or counts.

    S_r is the mean of what all visual rows, and of what the text behind the last image, attend to in the layer just
    run, mean over heads. S_s is 1 - 3 / `step`^2 on every `step`-th row and column of an image, 0 elsewhere. With
    `ratio="adaptive"` a visual row stays where S_r or S_s is above its threshold; both are the sigmoid of two linear
    maps of the means of the two attentions over visual rows, so that every prompt has its own. They are trained
    (`model.train()` with labels) while rows really leave: those that stay pass their gradient to the soft mask max(s(10
    (S_r - t_r)), s(10 (S_s - t_s))), whose mean times the layer, and whose distance from `target`, are added to the
    loss. Before that they are refused.

    With a ratio nothing is trained: rows of the grid come first, the others by S_r; floor(V q^s) of V stay behind the
    s-th cut, q such that the mean over layers meets the ratio. Positions are kept. The paper multiplies attention by
    the soft mask in training and lets no row leave then; no code of its authors was to be had, and its numbers are
    those of an unofficial one.

    Source: ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models, CVPR 2025, arXiv:2412.00447. Cost: at
    each cut the attention of all visual rows and of the text, O(V L H d), in blocks of rows.

    Args:
        layers: first short layers, ascending; default 5, 15 and 25 of 32, in proportion.
        step: of the grid, at least 2.
        target: the share of visual rows that is to be left on average, in training.

    Raises:
        ValueError: a knob is none of its values, or the ratio is out of reach of these cuts.
    """

    step: int = 2
    target: float = 0.25

    source: ClassVar[str] = "own"
    adaptive: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True
    counts_only: ClassVar[bool] = True
    example = {"ratio": 0.4}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("step", self.step, least=2)
        check_number("target", self.target, 0, 1)

    def parts(self, layers: int, tokens: int | None, ratio: Fraction | None, keep: int | None) -> Mapping[str, Part]:
        """The image says where its grid is; the language model drops."""
        return {"vision": (ATPGrid(step=self.step), Fraction(0), None), "decoder": (self, ratio, keep)}

    def boundaries(self, layers: int) -> Sequence[int]:
        if self.layers is not None:
            return super().boundaries(layers)
        at = dict.fromkeys(max(1, round(Fraction(i * layers, 32))) for i in (5, 15, 25))
        return tuple(i for i in at if i < layers)

    def module(self, model: nn.Module) -> nn.Module:
        """For each cut the maps of (B, 2), means of attention, to (B, 2), thresholds before the sigmoid."""
        cuts = self.boundaries(model.config.get_text_config().num_hidden_layers)
        return nn.ModuleList(thresholds() for _ in cuts)

    def decide(self, view: DecoderView, keep: list[int] | None) -> Assignment | None:
        view.memory["attended"] = seen = attended(view)
        if keep is None:
            above, _ = self._above(view, seen)
            stays = view.removable & ((above > 0) | view.speaks)
        else:
            score = (seen.mean(-1) + view.memory["grid"]).masked_fill(view.speaks, torch.inf)
            stays = best_rows(score, view.removable, keep, view.image if self.scope == "per_image" else None)
        return Assignment.selection(view.valid & ~view.removable | stays)

    def gate(self, view: DecoderView, answer: Assignment) -> Tensor | None:
        if view.module is None or not (view.module.training and torch.is_grad_enabled()):
            return None
        soft = self._above(view, view.memory["attended"])[1] * view.visual
        count, total = soft.sum(1), view.visual.sum(1).clamp(min=1)
        view.losses.append(DEEP * (count / total).mean() * view.layer)
        view.losses.append(FAR * (count / total - self.target).abs().mean())
        return torch.where(view.visual, 1 + soft - soft.detach(), 1.0)

    def _above(self, view: DecoderView, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) how far rows are above the nearer of their thresholds, and the soft mask."""
        if not isinstance(view.module, nn.ModuleList):
            raise ValueError("ratio='adaptive': atp was compressed with a ratio, without thresholds; compress anew")
        means = (seen * view.visual[..., None]).sum(1) / view.visual.sum(1, keepdim=True).clamp(min=1)
        cut = list(self.boundaries(view.layers)).index(view.layer)
        least = view.module[cut](means.to(view.hidden.dtype)).float().sigmoid()
        spatial = view.memory["grid"] * (1 - 3 / self.step**2)
        above = torch.stack([seen.mean(-1) - least[:, :1], spatial - least[:, 1:]], -1)
        return above.amax(-1), (above * STEEP).sigmoid().amax(-1)


def attended(view: DecoderView) -> Tensor:
    """(B, S, 2): what visual rows, and the text behind the last image, attend to."""
    asks = (view.visual, behind_images(view))
    return torch.stack([view.attention(source="own", voters=rows) for rows in asks], -1)


def thresholds() -> nn.Module:
    """(B, 2) to (B, 2)."""
    out = nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 2))
    with torch.no_grad():
        out[1].bias.copy_(torch.tensor(BEGIN))
    return out


@dataclass
class ATPGrid(VisionMethod):
    """Which tokens of each image are on its grid: every `step`-th row and column. All tokens stay.

    Args:
        step: of the grid.
    """

    step: int = 2

    def note(self, tokens: Tokens) -> dict[str, Tensor]:
        row, column = tokens.place[..., 1], tokens.place[..., 2]
        return {"grid": ((row % self.step == 0) & (column % self.step == 0)).float()}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        raise AssertionError("it has no budget, and is not asked")
