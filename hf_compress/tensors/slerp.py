"""Interpolation of directions on the sphere, and which pairs are too different for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEAR = 1e-4  # sine of an angle below which directions are interpolated linearly


def slerp(u: Tensor, w: Tensor, t: float) -> Tensor:
    """The unit vectors that stand the share `t` of the way from `u` to `w`.

    e = [sin((1 - t) angle) u + sin(t angle) w] / sin(angle); linear, and normalised, where they are (anti)parallel or
    one of them is zero.

    Args:
        u, w: (..., d) fp32 unit vectors, or zeros.
    """
    angle = (u * w).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    near = sine.abs() < NEAR
    sine = sine.masked_fill(near, 1.0)
    a = torch.where(near, 1 - t, ((1 - t) * angle).sin() / sine)
    b = torch.where(near, t, (t * angle).sin() / sine)
    return F.normalize(a * u + b * w, dim=-1)


def divergent(cosine: Tensor, valid: Tensor, share: float) -> Tensor:
    """Pairs of directions whose cosine is in the lowest `share` of the range of cosines of their sample.

    Args:
        cosine: (B, H, n); valid: (B, 1 or H, n) bool, pairs that count.

    Returns:
        (B, H, n) bool: cosine <= min + share * (max - min), over all valid pairs of a sample.
    """
    low = cosine.masked_fill(~valid, torch.inf).amin((1, 2), keepdim=True)
    high = cosine.masked_fill(~valid, -torch.inf).amax((1, 2), keepdim=True)
    return (cosine - low <= share * (high - low)) & valid
