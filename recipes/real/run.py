"""Judge cache methods on a real chat model: perplexity behind a context, facts in running text, one turn and two.

python recipes/real/run.py --out outputs/real              # hours on one CPU core; call it again to go on after a stop
python recipes/real/run.py --out outputs/real --board recipes/real/board.md
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from board import write_board
from perplexity import perplexities
from texts import passages, write_questions

import hf_compress
from hf_compress.evaluate import sweep
from hf_compress.evaluate.models import load_model
from hf_compress.fetch import fetch
from hf_compress.saving import write_json

AFTER = 64  # tokens whose probability is asked for behind a context


def main(
    out: Annotated[Path, typer.Option(help="Folder for answers and numbers.")],
    model: Annotated[str, typer.Option(help="A folder or a hub name; by default SmolLM2, fetched if need be.")] = "",
    tokens: Annotated[int, typer.Option(help="Of every context.", min=128)] = 640,
    contexts: Annotated[int, typer.Option(help="With facts that are asked for.", min=1)] = 10,
    facts: Annotated[int, typer.Option(help="In every context; 1 is the needle in a haystack.", min=1)] = 2,
    texts: Annotated[int, typer.Option(help="For the perplexity.", min=1)] = 8,
    ratio: Annotated[float, typer.Option(help="Fraction of the cache that is removed.")] = 0.75,
    methods: Annotated[str, typer.Option(help="Comma-separated names, or all.")] = "all",
    board: Annotated[Path | None, typer.Option(help="A page of the results, beside those of the small models.")] = None,
    seed: Annotated[int, typer.Option(help="Of texts and facts.")] = 0,
) -> None:
    names = list(hf_compress.methods("cache")) if methods == "all" else methods.split(",")
    name = model or str(fetch("smollm2"))
    judged, tokenizer = load_model(name)
    out.mkdir(parents=True, exist_ok=True)
    found = out / "perplexity.json"
    if not found.exists():
        chosen = [t for t, _ in zip(passages(tokenizer, tokens + AFTER + 8, seed), range(texts))]
        ids = [tokenizer(text, return_tensors="pt").input_ids[:, : tokens + AFTER] for text in chosen]
        values = perplexities(judged, ids, tokens, names, ratio)
        how = {"tokens": tokens, "after": AFTER, "texts": len(ids), "ratio": ratio, "seed": seed}
        how |= {"python": platform.python_version(), "torch": torch.__version__}
        write_json(found, {"settings": how, "perplexity": values})
    questions = out / "questions.jsonl"
    write_questions(questions, tokenizer, tokens, contexts, facts, seed)
    for protocol in ("two-turn", "one-turn"):
        options = {"metric": "contains", "batch_size": 1, "max_new_tokens": 24, "timed": False, "protocol": protocol}
        sweep(judged, str(questions), names, [ratio], processor=tokenizer, out=out / protocol, **options)
    if board is not None:
        write_board(out, board)
    print(json.dumps({"wrote": str(board or out)}))


if __name__ == "__main__":
    typer.run(main)
