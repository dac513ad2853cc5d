"""MQT: queries in an order, any first few of which will do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_compress.methods.base import check_choice, check_count
from hf_compress.methods.cells import CellMethod, check_queries
from hf_compress.modules.queries import Queries
from hf_compress.registry import register
from hf_compress.signals import Assignment, Tokens

__all__ = ["MQT"]


@register("mqt", stage="vision", kind="trained", paper="arXiv:2405.19315", needs={"visual"})
@dataclass
class MQT(CellMethod):
    """The first K of many trained queries look at the image: one training, any number of tokens.

    Every query is a trained vector with a place in the image. q = LN(query + place), k = LN(LN(x) + place), v = LN(x)
    of the N projected tokens x (n, N, D) go through one attention over the whole image, which gives (n, K, D). Outputs
    know nothing of each other: those of fewer queries are the first of those of more. Trained with another K at every
    step (`train.Sampled`), the first queries learn what matters most, and the budget is chosen at inference. Cost
    O(N * D * C + N * K * C), C <= 512 channels of attention.

    Source: "Matryoshka Query Transformer for Large Vision-Language Models", NeurIPS 2024, arXiv:2405.19315
    (gordonhu608/MQT-LLaVA). There it stands in place of the projector and is trained on 558K captions first; here it
    reads projected tokens, so that every tower will do, and begins as means of them (`modules.attention.Pooling`), so
    that minutes of training suffice. Places: there a 16 x 16 grid in raster order, whose first queries share a corner;
    here a sequence whose every beginning covers the image. The code takes keys of places alone, so that all images are
    looked at alike; the paper describes attention to what is there.

    Trained for eleven minutes of CPU with the language model (`recipes/finetune`) the embedded LLaVA answers 95.0,
    94.0, 93.8 and 43.2 % of 400 questions at 49, 22, 9 and 1 tokens, of one checkpoint (all 196 tokens, untrained: 95.5
    %; random, untrained: 73.0, 51.7, 32.0 and 15.8 %).

    Args:
        queries: how many there are, and the largest K.
        content_keys: as in the paper; False: as in the code.

    Raises:
        ValueError: `queries` is no integer of at least 1, `content_keys` no bool, `positions` none of its values. Also:
            a budget of more tokens than queries.
    """

    queries: int = 256
    content_keys: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("queries", self.queries)
        check_choice("content_keys", self.content_keys, (True, False))

    def check(self, grid: tuple[int, int], keep: int) -> None:
        """Refuses more tokens than queries, unless all stay."""
        check_queries(self.queries, grid, keep)

    def module(self, model: nn.Module) -> nn.Module:
        """The queries and their attention."""
        return Queries(model.config.get_text_config().hidden_size, self.queries, self.content_keys)

    def assign(self, tokens: Tokens, keep: int) -> Assignment:
        """The middle tokens of K cells, (n, K): where the outputs stand in the prompt."""
        self.check(tokens.grid, keep)
        return super().assign(tokens, keep)
