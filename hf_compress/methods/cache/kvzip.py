"""KVzip: what re-reading the context looks at (arXiv:2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor, nn

from hf_compress.methods.base import Rereading, check_choice, check_count, check_counts
from hf_compress.methods.eviction import Eviction
from hf_compress.registry import register
from hf_compress.signals import AGAIN, CacheView, Read, Repetition
from hf_compress.tensors.select import adaptive


@register("kvzip", stage="cache", kind="repetition", paper="arXiv:2505.23416", needs={"columns"})
@dataclass
class KVzip(Rereading, Eviction):
    """Keep the entries that the model looks at when it has to repeat the context.

    After the prompt its context is fed again in chunks, with the whole cache in reach. Each entry scores the largest
    share of attention that any row and query head of the group gives it, among the first `prefix` entries, the chunk
    and the rows of the pass, in fp32. All heads of all layers share one budget by one ranking, exactly, and store
    segments of different lengths; each keeps the first `prefix` entries and the last `later` ones, to which `ratio`
    does not apply. The decision does not depend on a question, so that the cache serves any that follows; leave a
    question in the prompt out of the context by `later`.

    Token ids of the request to repeat are the tokenizer's: without `instruction_ids`, `next_ids` and `suffix_ids` the
    chunks are repeated plainly, each after the `anchor` tokens before it. The request of the paper is "\\n\\nRepeat the
    previous context exactly." for the first chunk, "\\n\\nRepeat the part of the previous context exactly, starting
    with " for later ones (the anchor follows it), and as suffix what opens the model's turn in its chat template. On
    vision-language models the stored embeddings of images are fed again, images whole, which the paper does not test;
    image blocks that see both ways, and features that are added inside the decoder (Qwen3-VL), are repeated without.
    The released code keeps one entry fewer, and takes the softmax in the dtype of the model.

    A question that is not left out ranks as context, and its entries, which the answer hangs on, draw little attention
    in a repetition. On the built-in Qwen2.5-VL at ratio 0.94 each head keeps 1.1 of its 8.7 (snapkv: 6.8), so that 40 %
    of 200 answers are right (kvrandom: 48). The image is ranked well: 88 % (80) of 200 answers are right if all text
    stays (scope="visual"), and 72 % (46) if the question comes after the compression.

    Source: "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", NeurIPS 2025, arXiv:2505.23416.
    Cost: one forward over the context in chunks, each against the whole cache, and a second pass over the attention to
    the chunk: with 2048 tokens on a CPU core 1.3 times the prompt alone in LLaMA-7B layers, 2.3 times in narrow ones
    (hidden size 1024), where attention weighs more; reading the context again is the method, so it cannot be had for
    less than one more prompt. Reports do not count it. Not offered: scores of whole heads from one calibration text,
    weights by the norm of values (KVzip+).

    Args:
        level: "pair" ranks the entries of all heads and layers together; "uniform" those of each head, which `budget`,
            `heads` and `store` then apply to.
        prefix: first entries, kept by all heads: a system prompt, or attention sinks.
        later: newest entries of the prompt that are not context.
        chunk: entries fed again at a time.
        anchor: entries before a chunk that tell where it starts.
        instruction_ids: token ids in front of the first chunk; next_ids: in front of the later ones, before the
            anchor (default: the same); suffix_ids: behind both.
    """

    level: str = "pair"
    prefix: int = 4
    later: int = 0
    chunk: int = 2000
    anchor: int = 8
    instruction_ids: Sequence[int] = ()
    next_ids: Sequence[int] | None = None
    suffix_ids: Sequence[int] = ()

    example = {"ratio": 0.5, "level": "uniform", "prefix": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("level", self.level, ("pair", "uniform"))
        for name, least in (("prefix", 0), ("later", 0), ("chunk", 1), ("anchor", 0)):
            check_count(name, getattr(self, name), least)
        for name, ids in self._ids().items():
            check_counts(name, ids, least=0)
        mixed = (self.budget, self.heads, self.store)
        if self.level == "pair" and mixed != ("uniform", "uniform", "dense"):
            raise ValueError(
                f"budget, heads, store={mixed}: level='pair' shares one budget over all layers and heads already; use "
                "level='uniform' with them"
            )

    def reads(self, depth: int) -> set[Read]:
        return {AGAIN}

    def _ids(self) -> dict[str, Sequence[int]]:
        """The token ids that were given, by argument."""
        given = {name: getattr(self, name) for name in ("instruction_ids", "next_ids", "suffix_ids")}
        return {name: ids for name, ids in given.items() if name != "next_ids" or ids is not None}

    def prepare(self, model: nn.Module, ratio: Fraction | None) -> None:
        known = model.get_input_embeddings().weight.shape[0]
        for name, ids in self._ids().items():
            if beyond := [i for i in ids if i >= known]:
                raise ValueError(f"{name}: {beyond} are not token ids of {type(model).__name__}, which has {known}")

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return self.level == "pair" or super().ragged

    def groups(self, layers: list[int]) -> list[list[int]]:
        return [layers] if self.level == "pair" else super().groups(layers)

    def head_budget(self, score: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
        return (
            adaptive(score, valid, budget, 0.0) if self.level == "pair" else super().head_budget(score, valid, budget)
        )

    def repeats(self, image: list[int]) -> list[Repetition]:
        stop = len(image) - self.later
        first = self.prefix
        chunks: list[Repetition] = []
        while first < stop:
            end = min(first + self.chunk, stop)
            while end < stop and image[end] >= 0 and image[end] == image[end - 1]:
                end += 1
            later = bool(chunks) and self.next_ids is not None
            before = tuple((self.next_ids if later else self.instruction_ids) or ())
            hint = max(first - self.anchor, self.prefix)
            chunks.append(Repetition(first, end, hint, self.prefix, before, tuple(self.suffix_ids)))
            first = end
        return chunks

    def score(self, view: CacheView) -> Tensor:
        assert view.scores is not None
        return view.scores

    def outside(self, view: CacheView) -> Tensor | None:
        ends = (view.order < self.prefix) | (view.order >= view.lengths - self.later)
        others = super().outside(view)
        return ends if others is None else ends | others
