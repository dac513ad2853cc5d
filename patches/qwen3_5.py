"""Qwen3.5, dense and mixture of experts: a language model of which most layers keep a state, behind a Qwen-VL tower."""

from __future__ import annotations

from hf_compress.patches.qwen2_vl import Qwen2_VL
from hf_compress.patches.unsupported import ENTRY_ONLY


class Qwen3_5(Qwen2_VL):
    """Three of four layers are a gated delta rule: one state whatever the number of tokens. The vision stage shortens
    what enters them; methods of the other stages choose among entries, or rows, that these layers do not have."""

    model_types = ("qwen3_5", "qwen3_5_moe")
    stages = ("vision",)
    without = ENTRY_ONLY
    around = frozenset({"qwen3_5_text", "qwen3_5_moe_text"})
    states = frozenset({"linear_attention"})
    gives = Qwen2_VL.gives - {"columns"}
