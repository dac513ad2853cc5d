"""Truncated singular value decompositions of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.tensors.draw import uniform


def factors(x: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The best approximations of (B, n, W) matrices by products of two factors.

    Args:
        x: rows that do not count must be zero.
        ranks: (B,) of every matrix, at most min(n, W).

    Returns:
        left (B, n, r) = U S and right (B, r, W), fp32, r the largest rank; zero beyond the rank of each matrix.
    """
    # fp64, and from products of the smaller side, to which rows of padding add exactly nothing: in fp32 a padded matrix
    # and the same one alone turn by 1e-4 within close singular values, and the cut falls between those
    wide = x.shape[1] < x.shape[2]
    exact = x.double().mT if wide else x.double()
    squares, basis = torch.linalg.eigh(exact.mT @ exact)
    r = int(ranks.max())
    inside = torch.arange(r, device=x.device) < ranks.to(x.device)[:, None]
    basis, s = basis.flip(-1)[..., :r], squares.flip(-1)[:, :r].clamp(min=0).sqrt()
    if wide:
        left, right = basis * s[:, None], F.normalize(exact @ basis, dim=1).mT
    else:
        left, right = exact @ basis, basis.mT
    # both are cut, so that nothing beyond the rank of a matrix is stored as if it mattered
    return (left * inside[:, None]).float(), (right * inside[..., None]).float()


@torch.no_grad()
def principal(x: Tensor, rank: int, steps: int = 2) -> Tensor:
    """The principal directions of samples: fp32 and approximate, by a few steps from a start that is always the same.

    Halko, Martinsson & Tropp, arXiv:0909.4061, algorithm 4.4. Cost O(n * S * N * rank) for each step.

    Args:
        x: (n, S, N) of every matrix S samples of N numbers.
        rank: how many, at most min(S, N).

    Returns:
        (n, N, rank), orthonormal columns, the strongest first; their signs mean nothing.
    """
    x = x.float() - x.float().mean(1, keepdim=True)
    start = uniform(torch.arange(rank, device=x.device), x.shape[2]).T - 0.5
    basis = torch.linalg.qr(x @ start).Q
    for _ in range(steps):
        basis = torch.linalg.qr(x @ torch.linalg.qr(x.mT @ basis).Q).Q
    return torch.linalg.svd(basis.mT @ x, full_matrices=False).Vh.mT
