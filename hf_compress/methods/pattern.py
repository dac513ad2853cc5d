"""What cache methods have in common that go by the order of the entries: sinks, places, and no scores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_compress.methods.base import CacheMethod, check_choice, check_count
from hf_compress.methods.holding import Holding
from hf_compress.signals import CacheView


@dataclass
class Pattern(Holding, CacheMethod):
    """A cache method that decides by the order of the entries (`keeps`) rather than by what they hold.

    The size is fixed at the end of the prompt and held while decoding; all heads and layers hold as many entries.

    Args:
        sinks: first tokens that always stay.
        rotation: "original" leaves every key at the rotation of its position in the text, so that distances stay
            true; "cache" rotates the i-th entry of the cache by i and the newest token by its place behind them, so
            that distances never exceed what is stored. Keys are then stored before their rotation and rotated at
            every step. Tokens fed together count on from there: one by one, the entries before a gap would stay nearer.
    """

    policy: str = "hold"
    sinks: int = 4
    rotation: str = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sinks", self.sinks, least=0)
        check_choice("rotation", self.rotation, ("original", "cache"))

    @property
    def relative(self) -> bool:  # type: ignore[override]
        return self.rotation == "cache"

    def score(self, view: CacheView) -> Tensor:
        stays = self.keeps(view)
        assert stays is not None
        return (view.order + stays * view.order.shape[-1]).float().expand(view.shape)
