"""RazorAttention: whole cache for retrieval heads, a window and a compensation entry for others (arXiv:2407.15891)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from hf_compress.calibrate.files import RETRIEVAL, Decoder, load
from hf_compress.methods.base import CacheMethod, check_choice, check_count, check_counts, check_file, check_number
from hf_compress.registry import register
from hf_compress.stores.compensated import CompensatedStore

LEAST = Fraction(1, 20)  # share of retrieval heads below which the method makes no sense


@register("razor", stage="cache", kind="attention", paper="arXiv:2407.15891")
@dataclass
class Razor(CacheMethod):
    """Retrieval heads keep everything; the others their sinks, a window and one entry for all the rest.

    Over all layers together the best KV heads by induction and by echo score are retrieval heads. In every other head
    the first `sinks` and the newest W entries stay, and the n between them become one compensation entry, the mean of
    their keys and values, that counts n times: n exp(q k), by ln n added to its logit. With f the share of retrieval
    heads, `ratio` fixes W = L (1 - ratio / (1 - f)) - sinks - 1; the paper's W = max(4000, L / 5) is a ratio of
    0.8 (1 - f) with `window=4000`. Where ratio leaves less than f, fewer heads (5 % at least) count as retrieval heads,
    with a warning. Acts at the end of the prompt; what is generated stays in all heads (the paper goes on folding
    entries that leave the window while decoding).

    Heads are measured once per model without data, `hf_compress.calibrate.retrieval_heads(model)`, and found beside
    the checkpoint. ALiBi models, for which the paper derives a bound instead of a measurement, are not supported.

    Source: "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads", ICLR 2025, arXiv:2407.15891. Cost:
    one gather; no attention is read.

    Args:
        sinks: first entries that stay in every head.
        window: least number of newest entries (4000 in the paper): a shorter prompt stays whole.
        induction, echo: shares of all KV heads that are retrieval heads by these scores.
        rotated: average keys as they are stored (the paper), where rotations of distant positions cancel; False:
            before their rotation, the mean then rotated to the position in the middle of the entries it stands for.
        retrieval: the retrieval heads as (layer, KV head) pairs, instead of a measurement.
        heads_file: file of the measurement; None: "retrieval_heads.json" in the folder that the model was loaded from.
    """

    sinks: int = 4
    window: int = 1
    induction: float = 0.14
    echo: float = 0.01
    rotated: bool = True
    retrieval: Sequence[Sequence[int]] | None = None
    heads_file: str | None = None

    ragged = True
    example = {"ratio": 0.5, "retrieval": [[1, 0]]}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sinks", self.sinks, least=0)
        check_count("window", self.window)
        check_choice("rotated", self.rotated, (True, False))
        for name in ("induction", "echo"):
            check_number(name, getattr(self, name), 0, 1)
        pairs = self.retrieval
        if pairs is not None and not (_is_list(pairs) and all(_is_list(pair) and len(pair) == 2 for pair in pairs)):
            raise ValueError(f"retrieval={pairs!r} must be a list of (layer, KV head) pairs")
        for pair in pairs or ():
            check_counts("retrieval", pair, least=0)
        check_file("heads_file", self.heads_file)
        self._store: CompensatedStore | None = None

    def prepare(self, model: nn.Module, ratio: Fraction | None) -> None:
        if ratio is None:
            raise ValueError("ratio=None: what local heads keep follows from it; give ratio, the fraction removed")
        if not ratio:
            return
        decoder = Decoder(model)
        every = [(i, h) for i in decoder.full for h in range(decoder.kv_heads)]
        if self.retrieval is None:
            chosen = self._measured(model, every, ratio)
        else:
            chosen = {(i, h) for i, h in self.retrieval}
            if unknown := sorted(chosen - set(every)):
                raise ValueError(f"retrieval: {unknown} are not (layer, KV head) pairs of a layer that sees everything")
        local = 1 - Fraction(len(chosen), len(every))
        if ratio >= local:
            raise ValueError(
                f"ratio={float(ratio):.4g}: {len(chosen)} retrieval heads of {len(every)} keep everything, so less "
                f"than {float(local):.4g} can be removed"
            )
        self._store = CompensatedStore(frozenset(chosen), 1 - ratio / local, self.sinks, self.window, self.rotated)

    def _measured(self, model: nn.Module, every: list[tuple[int, int]], ratio: Fraction) -> set[tuple[int, int]]:
        """The retrieval heads by the file: the best by either score, fewer where the ratio asks for it."""
        data = load(model, RETRIEVAL, self.heads_file)
        if data is None:
            raise ValueError(
                f"method='razor' needs the retrieval heads of {type(model).__name__}, and no {RETRIEVAL} lies beside "
                "its checkpoint; measure them with hf_compress.calibrate.retrieval_heads(model), or pass "
                "heads_file= or retrieval="
            )
        ranked = {k: sorted(every, key=lambda at: -data[k][at[0]][at[1]]) for k in ("induction", "echo")}

        def best(scale: Fraction) -> set[tuple[int, int]]:
            counts = {k: Fraction(getattr(self, k)) * scale * len(every) for k in ranked}
            return {at for k, n in counts.items() for at in ranked[k][: max(n > 0, round(n))]}

        chosen, room = best(Fraction(1)), (1 - ratio) / 2  # half of what stays is for local heads
        if Fraction(len(chosen), len(every)) < 1 - ratio:
            return chosen
        fewer = best(min(Fraction(1), max(LEAST, room) / (Fraction(self.induction) + Fraction(self.echo))))
        if len(fewer) < len(chosen):
            warnings.warn(
                f"razor: ratio={float(ratio):.4g} leaves less than its {len(chosen)} retrieval heads of {len(every)} "
                f"hold; {len(fewer)} are used",
                stacklevel=6,
            )
        return fewer

    def packing(self) -> CompensatedStore | None:
        return self._store


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))
