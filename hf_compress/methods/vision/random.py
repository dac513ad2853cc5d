"""Random selection: the bar every other method must clear."""

from __future__ import annotations

from dataclasses import dataclass

from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.draw import key, shuffled
from hf_compress.tensors.select import identity

__all__ = ["RandomTokens"]


@register("random", stage="vision", kind="control", paper="control", needs={"visual"})
@dataclass
class RandomTokens(VisionMethod):
    """K tokens drawn at random: other ones in every image, the same ones of it every time.

    What is drawn follows from `seed`, the pixels of the image and its place in the sample (its ordinal, and that of the
    crop or frame in it), so that crops of one colour still differ. Batch, padding, order, process and device change
    nothing, and no generator is read or advanced. Features that were passed ready-made (`mm_encoder_outputs`) stand in
    for pixels that nobody has seen: the draw is then another one. Cost O(pixels), on the device of the tower.

    Control, no paper. Differences to it are small on easy benchmarks: compare over many samples and several
    seeds.

    Args:
        seed: other tokens for every other number.

    Raises:
        ValueError: `seed` is not an integer of at least 0, or `positions` is none of its values.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("seed", self.seed, 0)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K): depends on N, K, `seed` and the content of the images."""
        if keep == tokens.count:
            return Assignment(identity(len(tokens), keep, tokens.device))
        order = shuffled(key(tokens.content, self.seed), tokens.count)
        return Assignment(order[:, :keep].sort(dim=1).values)
