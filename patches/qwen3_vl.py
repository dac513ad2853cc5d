"""Qwen3-VL, dense and mixture of experts: as Qwen2-VL, with DeepStack and one group of placeholders per frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.patches.qwen2_vl import Qwen2_VL


class Qwen3_VL(Qwen2_VL):
    """Features of early tower blocks are added to the visual rows behind the first decoder layers (DeepStack): rows
    may drop only after the last of them, and what the vision stage removes is removed there too. A token that others
    were merged into gets its own DeepStack features, not a mixture."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")

    def min_drop_layer(self, model: nn.Module) -> int:
        return max(1, len(self.tower(model).deepstack_visual_indexes))

    def cut_extras(self, kw: dict[str, Any], keep: Tensor, rows: Tensor, alive: Tensor) -> None:
        visual, features = kw.get("visual_pos_masks"), kw.get("deepstack_visual_embeds")
        if visual is None or features is None:
            return
        stay = keep[visual]  # the features stand in the order of the visual rows
        kw["deepstack_visual_embeds"] = [x[stay.to(x.device)] for x in features]
        kw["visual_pos_masks"] = visual.gather(1, rows) & alive

    def tower_mergers(self, model: nn.Module) -> list[nn.Module]:
        return [*super().tower_mergers(model), *self.tower(model).deepstack_merger_list]

    def spread(self, out: Any, index: Tensor) -> None:
        super().spread(out, index)
        out.deepstack_features = [x[index] for x in out.deepstack_features]

    def refill(self, out: Any, features: Tensor, keep: Tensor) -> Any:
        out = super().refill(out, features, keep)
        out.deepstack_features = [[torch.cat(list(x))[keep.to(x[0].device)]] for x in out.deepstack_features]
        return out
