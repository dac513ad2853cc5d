"""Expected Attention: the attention that future queries will pay, in closed form (arXiv:2510.00636)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.methods.base import check_count, check_number
from hf_compress.methods.eviction import Eviction
from hf_compress.registry import register
from hf_compress.signals import QUERIES, CacheView, Read
from hf_compress.tensors.attention import at_once


@register("expected", stage="cache", kind="content", paper="arXiv:2510.00636")
@dataclass
class ExpectedAttention(Eviction):
    """Keep what queries after the prompt can be expected to attend to, whatever they will ask.

    The queries of the prompt, before their rotation and without the first `sinks` rows, give a mean and a covariance
    per query head; both are turned by the mean rotation R of the next `future` positions (M-RoPE: positions of text).
    For a normal distribution of queries the expected exponential of a logit is known, and

        z = s mean . k + s^2/2 k . cov k,    p = softmax(z),    score = (mean of p over the group + epsilon) * |v|

    with s the scale of the logits. The first `sinks` entries always stay. As in the released code R is averaged before
    it is applied to the covariance, which is not the covariance of rotated queries. Where a model normalises queries
    after their rotation (HunYuan), what is rotated back here is the normalised query. The ranking is made once, at the
    end of the prompt; the paper's periodic decoding variant, which keeps a buffer of queries, is not implemented.

    Made for questions that come after the prompt. The newest entries are not protected, so a question that ends the
    prompt is evicted with the rest, and what comes after the first new token has lost it: on the recall model it is
    far above random eviction when the question follows in a second turn (97.3 % against 25.8 % at ratio .75), and below
    it when the prompt holds it (3.1 % against 12.2 %).

    Source: "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    arXiv:2510.00636. Cost: O(L d^2) per query head, one KV head at a time; with 2048 tokens on a CPU core 2 % of a
    prefill of LLaMA-7B layers, 5 % of narrow ones (hidden size 1024), most of it for turning the queries back.

    Args:
        sinks: first rows that do not count among the queries, and first entries that always stay.
        future: positions over which rotations are averaged.
        epsilon: added to the expected attention, so that large values matter everywhere (0.01 in the paper's
            leaderboard entry, which also shares the budget among heads: `adakv` with scorer="expected").
    """

    sinks: int = 4
    future: int = 512
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sinks", self.sinks, least=0)
        check_count("future", self.future)
        check_number("epsilon", self.epsilon, 0)

    def reads(self, depth: int) -> set[Read]:
        return {QUERIES}

    def score(self, view: CacheView) -> Tensor:
        (B, H, S), d = view.shape, view.keys.shape[3]
        groups = view.queries.shape[1] // H
        late = view.valid & (view.order >= self.sinks)  # (B, 1, S)
        turn = view.future_rotation(self.future)[:, None]
        attention, heads = [], min(H, at_once(late.device, B * groups * S * d))  # whose fp32 copies are made at a time
        for keys, queries in zip(view.keys.split(heads, 1), view.queries.split(heads * groups, 1)):
            mean, cov = moments(view.unrotate(queries.float()), late)
            mean, cov = (x.unflatten(1, (-1, groups)) for x in (mean @ turn, turn.mT @ cov @ turn))
            z = expected_logits(keys.float()[:, :, None], mean, cov, view.scaling)
            attention.append(z.masked_fill(~late[:, :, None], -torch.inf).softmax(-1).mean(2))
        norm = torch.linalg.vector_norm(view.values.float(), dim=-1)
        score = (torch.cat(attention, 1) + self.epsilon) * norm
        return score.masked_fill(~late, torch.inf)


def moments(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, H, 1, d) and covariance (B, H, d, d) of queries (B, H, S, d) over the `rows` (B, 1, S) that count."""
    queries = queries.float()
    weight, count = rows.float()[..., None], rows.sum(-1)[..., None, None].clamp(min=1)
    mean = weight.mT @ queries / count
    centred = (queries - mean).mul_(weight)
    return mean, centred.mT @ centred / count


def expected_logits(keys: Tensor, mean: Tensor, cov: Tensor, scaling: float) -> Tensor:
    """(..., S) log of the expected exponential of a logit: keys (..., S, d), queries normal with `mean` and `cov`."""
    return (keys @ (scaling**2 / 2 * cov)).add_(scaling * mean).mul_(keys).sum(-1)
