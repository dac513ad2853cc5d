"""Judge what acts on text on a real chat model: perplexity behind a context, facts in it, one turn and two.

python recipes/real/run.py --out outputs/real              # half an hour of one CPU core; call it again to go on
python recipes/real/run.py --out outputs/real --board outputs/real/board.md
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from board import write_board
from facts import ask_later, ask_within, digits_told
from heads import FILES, measure
from perplexity import likelihood
from texts import Asked, asked_contexts, passages

import hf_compress
from hf_compress import registry
from hf_compress.evaluate.judge import everything
from hf_compress.evaluate.models import load_model
from hf_compress.fetch import fetch
from hf_compress.saving import write_json

AFTER = 64  # tokens whose probability is asked for behind a context
BARE = "none"


class Judge:
    """A model with its texts; what a method makes of them is written after each measurement.

    Attributes:
        texts: (1, more than `tokens` + 1) ids each, for the perplexity.
        asked: contexts with their questions.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any], file: Path):
        self.model, self.tokenizer, self.settings, self.file = model, tokenizer, settings, file
        tokens, seed = settings["tokens"], settings["seed"]
        long = zip(passages(tokenizer, tokens + AFTER + 8, seed), range(settings["texts"]))
        self.texts = [tokenizer(text, return_tensors="pt").input_ids[:, : tokens + AFTER] for text, _ in long]
        self.asked = asked_contexts(tokenizer, tokens, settings["contexts"], settings["facts"], seed)
        self.found = self._read()

    def _read(self) -> dict[str, Any]:
        if not self.file.exists():
            return {"settings": self.settings, "rows": {}, "refused": {}}
        found: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        if found["settings"] != self.settings:
            raise ValueError(f"{self.file} was made by {found['settings']}, not {self.settings}; name another folder")
        return found

    def judge(self, label: str, method: str, knobs: dict[str, Any]) -> None:
        """All that is lacking of a method, or why it cannot act on this model.

        Perplexity is asked of the bare model and of cache methods: what others leave out are rows of a prompt, and the
        text behind the context is a second prompt to them.
        """
        row = self.found["rows"].setdefault(label, {"minutes": 0.0})
        whole = method == BARE or hf_compress.methods()[method].stage == "cache"
        parts = {"likelihood": whole, "later": True, "within": bool(self.settings["within"])}
        for part, asked in parts.items():
            if not asked or part in row:
                continue
            started = time.process_time()
            try:
                row[part] = getattr(self, f"_{part}")(method, knobs)
            except (ValueError, NotImplementedError) as error:
                del self.found["rows"][label]
                self.found["refused"][label] = str(error)
                write_json(self.file, self.found)
                return
            self.found["refused"].pop(label, None)
            row["minutes"] = round(row["minutes"] + (time.process_time() - started) / 60, 2)
            write_json(self.file, self.found)
        print(label, f"{row['minutes']} minutes", flush=True)

    def _likelihood(self, method: str, knobs: dict[str, Any]) -> list[float]:
        at = self.settings["tokens"]
        return [
            round(self._with(i, method, knobs, likelihood, ids[:, :at], ids[:, at:]), 5)
            for i, ids in enumerate(self.texts)
        ]

    def _later(self, method: str, knobs: dict[str, Any]) -> list[list[int]]:
        return [self._digits(i, method, knobs, ask_later, one) for i, one in enumerate(self.asked)]

    def _within(self, method: str, knobs: dict[str, Any]) -> list[list[int]]:
        few = self.settings["within"]
        return [self._digits(i, method, knobs, ask_within, (text, qs[:few])) for i, (text, qs) in enumerate(self.asked)]

    def _digits(self, number: int, method: str, knobs: dict[str, Any], ask: Any, one: Asked) -> list[int]:
        """Of each code, how many of its digits the answer tells."""
        context, asked = one
        said = self._with(number, method, knobs, ask, self.tokenizer, context, [question for question, _ in asked])
        return [digits_told(answer, code) for answer, (_, code) in zip(said, asked)]

    def _with(self, number: int, method: str, knobs: dict[str, Any], call: Any, *args: Any) -> Any:
        """A call on the compressed model; methods that draw do so by the number of the text."""
        if method == BARE:
            return call(self.model, *args)
        if "seed" in hf_compress.methods()[method].knobs:
            knobs = {**knobs, "seed": number}
        with hf_compress.compressed(self.model, method, self.settings["ratio"], **knobs):
            return call(self.model, *args)


def variants(names: list[str], folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is judged: label -> (method, knobs). `compresskv` also without its heads, as one finds it at first."""
    chosen: dict[str, tuple[str, dict[str, Any]]] = {BARE: (BARE, {})}
    for name in names:
        chosen[name] = (name, {"heads_file": str(folder / FILES[name])} if name in FILES else {})
        if name == "compresskv":
            chosen["compresskv, all heads"] = (name, {})
    return chosen


def main(
    out: Annotated[Path, typer.Option(help="Folder for the numbers.")],
    model: Annotated[str, typer.Option(help="A folder or a hub name; by default SmolLM2, fetched if need be.")] = "",
    tokens: Annotated[int, typer.Option(help="Of every context.", min=128)] = 640,
    contexts: Annotated[int, typer.Option(help="With facts that are asked for.", min=1)] = 12,
    facts: Annotated[int, typer.Option(help="In every context; 1 is the needle in a haystack.", min=1)] = 2,
    within: Annotated[int, typer.Option(help="Facts of a context that are asked for in the prompt, too.", min=0)] = 1,
    texts: Annotated[int, typer.Option(help="For the perplexity.", min=1)] = 8,
    ratio: Annotated[float, typer.Option(help="Fraction of the cache that is removed.")] = 0.75,
    methods: Annotated[str, typer.Option(help="Comma-separated names, or all.")] = "all",
    dtype: Annotated[str, typer.Option(help="Of the weights, and so of the cache.")] = "bfloat16",
    board: Annotated[Path | None, typer.Option(help="A page of the results, beside those of the small models.")] = None,
    seed: Annotated[int, typer.Option(help="Of texts and facts.")] = 0,
) -> None:
    name = model or str(fetch("smollm2"))
    judged, tokenizer = load_model(name, dtype=dtype)
    names = (
        everything(judged)[0]
        if methods == "all"
        else [registry.get(name, "methods").name for name in methods.split(",")]
    )
    settings = {"model": Path(name).name, "dtype": dtype, "tokens": tokens, "after": AFTER, "ratio": ratio}
    settings |= {"texts": texts, "contexts": contexts, "facts": facts, "within": min(within, facts), "seed": seed}
    settings |= {"python": platform.python_version(), "torch": torch.__version__}
    settings |= {"transformers": transformers.__version__, "hf_compress": hf_compress.__version__}
    out.mkdir(parents=True, exist_ok=True)
    judge = Judge(judged, tokenizer, settings, out / "results.json")
    if not FILES.keys().isdisjoint(names):
        measure(judged, tokenizer, out)
    for label, (method, knobs) in variants(names, out).items():
        judge.judge(label, method, knobs)
    if board is not None:
        write_board([judge.file], board)
    print(json.dumps({"wrote": str(board or judge.file)}))


if __name__ == "__main__":
    typer.run(main)
