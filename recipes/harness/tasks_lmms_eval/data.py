"""The embedded scenes for lmms-eval, which reads files: `python data.py [IMAGES] [QUESTIONS]` writes scenes.parquet."""

import sys
from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    return {"exact_match": float(str(results[0]).strip().lower() == doc["answer"].lower())}


if __name__ == "__main__":
    from hf_compress.demo.dataset import load_scenes

    images, questions = (int(argument) for argument in [*sys.argv[1:], *["40", "4"][len(sys.argv) - 1 :]])
    load_scenes("test", images=images, questions=questions).to_parquet("scenes.parquet")
