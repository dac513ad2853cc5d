"""Which heads of a model retrieve: what `razor` and `compresskv` want measured once, on texts of their own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from texts import FACT, passages, with_facts

from hf_compress.calibrate import retrieval_heads, semantic_heads
from hf_compress.evaluate.prompts import encode_texts, render

FILES = {"razor": "retrieval_heads.json", "compresskv": "semantic_heads.json"}
REPEATED = 500  # random tokens, four times over
PROMPTS, TOKENS = 12, 640  # with a needle; a quarter of them stays in the layers whose error is measured
SEED = 1_000  # of their order and codes; those that are judged are drawn by others


def measure(model: Any, tokenizer: Any, folder: Path) -> None:
    """Both files, in `folder`; one that is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    heads, errors = (folder / name for name in FILES.values())
    if not heads.exists():
        retrieval_heads(model, tokens=REPEATED, path=heads)
    if not errors.exists():
        semantic_heads(model, prompts(tokenizer, TOKENS), keep=TOKENS // 4, max_new_tokens=24, path=errors)


def prompts(tokenizer: Any, tokens: int) -> list[dict[str, Any]]:
    """Chat prompts, each with one fact that is asked for, and the rows of `input_ids` that state it."""
    rng, found = random.Random(SEED), []
    for passage, _ in zip(passages(tokenizer, tokens - 100, SEED), range(PROMPTS)):
        context, [(question, code)] = with_facts(passage, 1, rng)
        text = render(tokenizer, question, context)
        encoded = encode_texts(tokenizer, [text], [context], return_offsets_mapping=True)
        stop = text.index(f" is {code}.") + len(f" is {code}.")
        start = text.rindex(FACT.partition("{")[0], 0, stop)
        rows = [i for i, (a, b) in enumerate(encoded.pop("offset_mapping")[0].tolist()) if a < stop and b > start]
        answer = torch.tensor(tokenizer(code, add_special_tokens=False).input_ids)
        found.append({**encoded, "needle": (rows[0], rows[-1] + 1), "answer": answer})
    return found
