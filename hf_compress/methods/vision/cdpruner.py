"""CDPruner: a subset that is diverse among what matters to the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.methods.base import VisionMethod
from hf_compress.registry import register
from hf_compress.signals import QUESTION, Assignment, Read, Tokens
from hf_compress.tensors.diversity import determinantal

__all__ = ["CDPruner"]


@register("cdpruner", stage="vision", kind="question", paper="arXiv:2506.10967", needs={"visual"})
@dataclass
class CDPruner(VisionMethod):
    """The most probable subset of a determinantal process that the question conditions.

    On the embeddings (n, N, D) that the language model reads: 1. the relevance r (n, N) of a token is its mean cosine
    to the embedded tokens of the question, scaled to (0, 1] in each image. 2. The kernel is L_ij = r_i * cos_ij * r_j.
    3. K picks, each the token that raises the determinant of the picked ones most (greedy MAP); raster order. Without a
    question (no text behind the image, or all of it is labelled) every r is 1. Every crop and frame picks its own K.
    Cost O(K * (N + K) * D); no kernel is formed: its factor r_i * x_i / |x_i| says all.

    Source: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    arXiv:2506.10967. Paper and code take the relevance from CLIP's joint space, negated, as its raw patches near the
    text are background; no model here has a CLIP text tower, so that the embeddings of the language model stand in,
    with their sign, as an inference engine does that serves it. The code scales over the batch, here over each image;
    the exponential weighting of the paper is off in its code and is not offered. On the embedded LLaVA the stand-in
    misleads: at 89 and 94 % removed 93 and 89 % of 200 questions are answered, 95.5 and 92.5 % with every r at 1.
    """

    def reads(self, depth: int) -> set[Read]:
        return {QUESTION}

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); ties go to the lower index."""
        x = tokens.embeddings.detach().float()
        return Assignment(determinantal(x, relevance(x, *tokens.question), keep).sort(dim=1).values)


def relevance(x: Tensor, text: Tensor, real: Tensor) -> Tensor:
    """(n, N), almost 0 to 1 in each image: mean cosine of tokens (n, N, D) to the real ones of a text (n, T, D)."""
    n, N, _ = x.shape
    if not text.shape[1]:
        return torch.ones(n, N, device=x.device)
    centre = (F.normalize(text.float(), dim=-1) * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    cosine = (F.normalize(x, dim=-1) @ centre[..., None])[..., 0]
    low, high = cosine.aminmax(dim=1, keepdim=True)
    return torch.where(high > low, (cosine - low + 1e-6) / (high - low), 1.0)
