"""What is dropped comes back in a few clusters: what several decoder methods do with the rows that go."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.signals import Assignment, DecoderView
from hf_compress.tensors.cluster import density_peaks
from hf_compress.tensors.rows import best_rows


def recycle(view: DecoderView, score: Tensor, keep: list[int], share: float, scope: str) -> Assignment:
    """`keep` rows of each sample: the best by `score` (B, S), and the means of clusters of the best of the others.

    Of D that are dropped the floor(`share` D) + 1 best ranked, x, form floor(x / 10) + 1 clusters (`density_peaks`, as
    many neighbours as clusters), whose means stay at the places of their centres; the others vanish. Clusters count in
    `keep`. Rows that others predict from are among the best, and as they are. With a share of 0 there are no clusters;
    `scope` is that of `DecoderMethod`.
    """
    score = score.masked_fill(view.speaks, float("inf"))
    left = view.removable.sum(1).tolist()
    clusters = [_clusters(n, k, share) for n, k in zip(left, keep)]
    part = view.image if scope == "per_image" else None
    stays = best_rows(score, view.removable, [k - c for k, c in zip(keep, clusters)], part)
    owner = torch.where(view.valid & ~view.removable | stays, torch.arange(stays.shape[1], device=stays.device), -1)
    for b, count in enumerate(clusters):
        if count:
            dropped = view.removable[b] & ~stays[b]
            x = int(share * int(dropped.sum())) + 1
            some = best_rows(score[b : b + 1], dropped[None], [x])[0].nonzero()[:, 0]
            centres, groups = density_peaks(view.hidden[b, some][None], count, count)
            owner[b, some] = some[centres[0]][groups[0]]
    return Assignment.owned(owner)


def _clusters(rows: int, keep: int, share: float) -> int:
    """How many of the `keep` outputs of so many rows are clusters, the others being the best ranked rows."""
    if keep >= rows or not share:
        return 0
    for count in range(keep):  # rows that stay: fewer leave more to be clustered
        if count == int((int(share * (rows - keep + count)) + 1) / 10) + 1:
            return count
    return 0
