"""Random selection: the bar every other method must clear."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.registry import register
from hf_compress.signals import Assignment, Images
from hf_compress.tensors.select import identity

__all__ = ["RandomTokens"]


@register("random", stage="vision", paper="control", needs={"visual"})
@dataclass
class RandomTokens(VisionMethod):
    """K tokens drawn at random, the same ones every time.

    Image i of a batch draws a permutation of its N tokens from its own CPU generator, seeded with `seed + i`,
    and keeps the first K in raster order. The global generators are neither read nor advanced, and the draw
    does not depend on the device. Cost O(N) on the host per image.

    Control, no paper. Differences to it are small on easy benchmarks: compare over many samples and several
    seeds.

    Args:
        seed: seed of the first image.

    Raises:
        ValueError: `seed` is not an integer of at least 0, or `positions` is none of its values.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("seed", self.seed, 0)

    def assign(self, images: Images, keep: int) -> Assignment:
        """Selection (n, K): depends on N, K, `seed` and the ordinals of the images, on nothing they show."""
        if keep == images.tokens:
            return Assignment(identity(len(images), keep, images.device))
        draws = [
            torch.randperm(images.tokens, generator=torch.Generator().manual_seed(self.seed + i))[:keep]
            for i in images.index
        ]
        return Assignment(torch.stack(draws).sort(dim=1).values.to(images.device, non_blocking=True))
