"""VQToken: a video as a codebook of what it shows, which has read where each entry occurs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_compress.methods.base import VisionMethod, check_count
from hf_compress.modules.attention import Attention, Mlp
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.cluster import kmeans
from hf_compress.tensors.diversity import farthest
from hf_compress.tensors.merge import by_first, group_sum

__all__ = ["VQToken"]


@register("vqtoken", stage="vision", kind="trained", paper="arXiv:2503.16980", needs={"visual"})
@dataclass
class VQToken(VisionMethod):
    """The tokens of a whole video in K clusters; their means read in which frames they occur.

    1. The projected tokens (n, T * N, D) of all frames are clustered by cosine: k-means from those that are farthest
    from each other, `steps` times (`tensors.cluster.kmeans`, `tensors.diversity.farthest`). 2. The map of who belongs
    where becomes one vector per frame: the mean over its cells of a trained vector for each cluster. 3. The means of
    the clusters read each other and these vectors (one layer, without effect at the start) and stand in the slots of
    their first tokens. Clusters are numbered by these. Gradient flows through the means, not through the clusters. An
    image is a video of one frame. Cost O((T * N)^2 * D + steps * T * N * K * D), and a layer of K tokens.

    Source: "VQToken: Neural Discrete Token Representation Learning for Extreme Token Reduction in Video Large Language
    Models", NeurIPS 2025, arXiv:2503.16980 (Hai-chao-Zhang/VQToken). There the numbers of the clusters themselves go
    through a linear map as the queries, and as many outputs come as there are frames, or clusters if these are more,
    some of them twice; here they have vectors, and outputs are K. There means are those of normalised tokens, of
    another length than the model knows; the start of k-means is drawn; and K can be found by an elbow.

    Args:
        codes: trained vectors, and the largest K.
        steps: of k-means.

    Raises:
        ValueError: `codes` or `steps` is no integer of at least 1, `positions` none of its values. Also: a budget of
            more tokens than codes.
    """

    codes: int = 256
    steps: int = 10

    needs_weights: ClassVar[bool] = True
    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("codes", self.codes)
        check_count("steps", self.steps)

    def check(self, grid: tuple[int, int], keep: int) -> None:
        """Refuses more tokens than codes, unless all stay."""
        if self.codes < keep < grid[0] * grid[1]:
            raise ValueError(
                f"codes={self.codes} give at most {self.codes} tokens, and {keep} shall stay; remove more, or set "
                "codes= (and train them)"
            )

    def module(self, model: nn.Module) -> nn.Module:
        """The vectors of the codes and the layer."""
        return Codebook(model.config.get_text_config().hidden_size, self.codes)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Groups (n, T * N) with plain means, kept (n, K) the first token of each."""
        self.check((1, tokens.count), keep)
        x = tokens.embeddings
        groups = kmeans(x, farthest(x, keep), self.steps)
        groups, kept = by_first(groups, keep)
        return Assignment(kept, groups)

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        """(n, K, D)."""
        assert tokens.module is not None and assignment.groups is not None
        frames = assignment.groups.unflatten(1, (len(tokens.grids), -1))
        out: Tensor = tokens.module(assignment.apply(tokens.embeddings), frames)
        return out


class Codebook(nn.Module):
    """See `VQToken`."""

    def __init__(self, width: int, codes: int):
        super().__init__()
        self.code = nn.Parameter(nn.init.trunc_normal_(torch.empty(codes, width), std=0.02))
        self.among, self.across, self.mlp = Attention(width), Attention(width), Mlp(width)

    def forward(self, means: Tensor, index: Tensor) -> Tensor:
        """Means (n, K, D) of clusters, of which `index` (n, T, N) says who belongs where, to (n, K, D)."""
        (n, T, N), K = index.shape, means.shape[1]
        ones = torch.ones(n * T, N, device=means.device)  # fp32: half precision cannot count
        share = group_sum(ones, index.flatten(0, 1), K).view(n, T, K) / N
        out: Tensor = self.mlp(self.across(self.among(means), share.to(self.code.dtype) @ self.code[:K]))
        return out
