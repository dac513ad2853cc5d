"""TDC: one whole frame of every chunk of a scene, and of the others a few tokens that say what is new."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.budget import check_share, shares
from hf_compress.methods.base import VisionMethod, check_count, check_number
from hf_compress.methods.question import asked
from hf_compress.modules.attention import Attention, Mlp, Pooling
from hf_compress.modules.positions import middles, sincos
from hf_compress.registry import register
from hf_compress.signals import QUESTION, Assignment, Read, Tokens
from hf_compress.tensors.cells import Cells, cells, means
from hf_compress.tensors.frames import scenes

__all__ = ["TDC"]


@register("tdc", stage="vision", kind="trained", paper="arXiv:2504.10443", needs={"visual", "video"})
@dataclass
class TDC(VisionMethod):
    """The first frame of every chunk stays, the others become what its cells find in them.

    On the projected tokens (n, T * N, D) of a video: 1. A scene ends behind the floor(T * `cuts`) frames that are least
    like the next one (cosine of all their tokens side by side), and is cut into chunks of at most `chunk` frames. 2.
    The K tokens are shared, the first frame of a chunk getting `weight` times as many as another one, all of its N at
    most. 3. Of a first frame the means of its cells stay (`tensors.cells`; of N tokens the tokens). The tokens of
    another frame are the cells of the first one of its chunk, which read each other and the question (the mean of the
    embedded text behind), and then attend to that frame; they begin as means of its tokens. Cost O(T * N * D * c), c <=
    512 channels of attention. Outputs follow the question. An image is a first frame.

    Source: "Multimodal Long Video Modeling Based on Temporal Dynamic Context", arXiv:2504.10443 (Hoar012/TDC-Video).
    There a first frame has 144 tokens, another 16, of a Q-Former made of BERT that reads all words of the question;
    scenes are found by DINO, 24 cuts of 224 frames; outputs are scaled to length one beside neighbours that are not;
    and a trained token stands between frames. Here one layer of each attention stands behind the projector that is
    there, outputs have the scale of tokens, and what is too long is no longer cut at the tail of chunks but shared.
    Sound is left out.

    Args:
        chunk: frames of a chunk, at most.
        cuts: scenes end behind this share of the frames.
        weight: tokens of a first frame for one of another.

    Raises:
        ValueError: `chunk` is no integer of at least 1, `cuts` no number in [0, 1), `weight` none of at least 1, or
            `positions` none of its values.
    """

    chunk: int = 8
    cuts: float = 24 / 224
    weight: float = 9.0

    needs_weights: ClassVar[bool] = True
    scope: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chunk", self.chunk)
        check_share(self.cuts, "cuts")
        check_number("weight", self.weight, 1)

    def reads(self, depth: int) -> set[Read]:
        return {QUESTION}

    def module(self, model: nn.Module) -> nn.Module:
        """What reads the other frames."""
        return Context(model.config.get_text_config().hidden_size)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The middle tokens of the cells of every frame, (n, K)."""
        (h, w), kept = tokens.grids[0], []
        for first in self.firsts(tokens):
            weights = [self.weight if t == f else 1.0 for t, f in enumerate(first)]
            counts = shares(keep, weights, [h * w] * len(first))
            kept.append(torch.cat([t * h * w + cells(h, w, k).centres for t, k in enumerate(counts) if k]))
        return Assignment(torch.stack(kept).to(tokens.device))

    def firsts(self, tokens: Tokens) -> list[list[int]]:
        """Of n videos for every frame the first one of its chunk."""
        x = tokens.embeddings.detach().float().unflatten(1, (len(tokens.grids), -1)).flatten(2)
        alike, T = F.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1), x.shape[1]
        ends = int(T * check_share(self.cuts, "cuts"))
        return [chunked(scene, self.chunk) for scene in scenes(alike, -2, ends + 1).tolist()]

    def make(self, tokens: Tokens, assignment: Assignment) -> Tensor:
        """(n, K, D)."""
        assert tokens.module is not None
        T, (h, w), question = len(tokens.grids), tokens.grids[0], asked(tokens)
        x, out = tokens.embeddings.unflatten(1, (T, h * w)), assignment.pick(tokens.embeddings)
        alike: dict[tuple[int, bool], list[tuple[int, int, int, int]]] = {}
        for i, (first, kept) in enumerate(zip(self.firsts(tokens), assignment.kept)):
            counts = torch.bincount(kept // (h * w), minlength=T).tolist()
            for t, (k, start) in enumerate(zip(counts, accumulate(counts, initial=0))):
                if k:
                    alike.setdefault((k, t == first[t]), []).append((i, t, first[t], start))
        for (k, whole), frames in alike.items():
            layout = cells(h, w, k, x.device)
            row, frame, look, at = torch.tensor(frames, device=x.device).unbind(1)
            found = means(x[row, look], layout)
            if not whole:
                found = tokens.module(found, question[row], x[row, frame], layout)
            out = out.index_put((row[:, None], at[:, None] + torch.arange(k, device=x.device)), found.to(out))
        return out


def chunked(scene: list[int], size: int) -> list[int]:
    """Of every frame the first one of its chunk, from the numbers of their scenes."""
    out: list[int] = []
    for t, number in enumerate(scene):
        new = not t or number != scene[t - 1] or t - out[-1] == size
        out.append(t if new else out[-1])
    return out


class Context(nn.Module):
    """See `TDC`."""

    def __init__(self, width: int):
        super().__init__()
        self.among, self.attention, self.mlp = Attention(width), Pooling(width), Mlp(width)
        self.norm, self.norm_query = nn.LayerNorm(width), nn.LayerNorm(width)
        nn.init.orthogonal_(self.attention.query.weight)
        self.attention.key.load_state_dict(self.attention.query.state_dict())  # cells begin by looking for their like

    def forward(self, first: Tensor, question: Tensor, x: Tensor, layout: Cells) -> Tensor:
        """Cells (m, K, D) of first frames, questions (m, D), other frames (m, N, D) to (m, K, D)."""
        query = self.norm_query(self.among(torch.cat([first, question[:, None]], 1))[:, :-1])
        place = sincos(middles(layout.grid, x.device), x.shape[-1]).to(x.dtype)
        value = self.norm(x)
        found = self.attention(query + place[layout.centres], value + place, value, x)
        out: Tensor = self.mlp(found)
        return out
