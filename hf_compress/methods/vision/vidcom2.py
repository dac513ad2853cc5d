"""VidCom2: frames unlike their video keep more, and of every frame what is unlike it stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.budget import shares
from hf_compress.methods.base import VisionMethod, check_number
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens
from hf_compress.tensors.select import top_by_part, top_mask

__all__ = ["VidCom2"]


@register("vidcom2", stage="vision", kind="video", paper="arXiv:2505.14454", needs={"visual", "video"})
@dataclass
class VidCom2(VisionMethod):
    """Tokens far from the centre of their frame and of their video, most of them in the frames that are unlike it.

    On the embeddings (n, T * N, D) of a whole video: 1. Of the channels the floor(D / 2) that vary least over it stay,
    and tokens are scaled to unit length on them. 2. Centres are the mean of the video and of each frame. k(x, c) is the
    sum of exp(-|x - c|^2 / (2 s)) over s = 1/8, 1/4, 1/2, 1, 2. 3. Of a frame p is the softmax over frames, divided by
    `temperature`, of -mean k(x, video); it gets min(1, share * (1 + p - 1 / T)) of its tokens, which together are
    exactly K by largest remainders. 4. The tokens of a frame with the smallest k(x, video) + k(x, frame) stay, in the
    order of time. `ratio` is the fraction of the whole video. Cost O(T * N * D).

    An image, or a video of one frame, keeps the tokens that are farthest from its mean: both centres are the same.

    Source: "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models",
    arXiv:2505.14454. Its code keeps at least one token of each frame and rounds, so that counts vary; here the budget
    is exact, and a frame may lose all tokens where there are hardly more of them than frames. With its temperature p
    is all but one for the frame that is most unlike the others, so that one frame gets up to twice its share.

    Args:
        temperature: the larger, the more alike the counts of frames.

    Raises:
        ValueError: `temperature` is not a number above 0.
    """

    temperature: float = 0.01

    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, 0, above=True)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """Selection (n, K); ties go to the lower index."""
        frames, N = len(tokens.grids), tokens.count // len(tokens.grids)
        x = steady(tokens.embeddings.detach().float()).unflatten(1, (frames, N))
        video, frame = closeness(x, x.mean((1, 2), keepdim=True)), closeness(x, x.mean(2, keepdim=True))
        p = (-video.mean(-1) / self.temperature).softmax(1)
        weights = (keep / tokens.count * (1 + p - 1 / frames)).clamp(max=1).tolist()
        counts = torch.tensor([shares(keep, mine, [N] * frames) for mine in weights], device=x.device)
        at = torch.arange(frames, device=x.device).repeat_interleave(N).expand(len(x), -1)
        return Assignment.selection(top_by_part(-(video + frame).flatten(1), at, counts))


def steady(x: Tensor) -> Tensor:
    """(n, V, D) to (n, V, D // 2): the channels that vary least, of unit length together; one channel stays."""
    few = max(1, x.shape[-1] // 2)
    stays = top_mask(-x.var(1, correction=0), few)
    return F.normalize(x.transpose(1, 2)[stays].view(len(x), few, -1).transpose(1, 2), dim=-1)


def closeness(x: Tensor, centre: Tensor) -> Tensor:
    """(n, T, N, D) and centres that broadcast against it to (n, T, N): the sum of five kernels, 5 at the centre."""
    square = (x - centre).square().sum(-1)
    return sum((-square / 2 ** (e + 1)).exp() for e in range(-3, 2))  # type: ignore[return-value]
