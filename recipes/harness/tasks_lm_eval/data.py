"""The embedded data as the harnesses want it: splits by name, made on the spot."""

from typing import Any

from hf_compress.demo.dataset import load_scenes
from hf_compress.demo.recall_data import load_recall
from hf_compress.demo.recall_data import prompt as recall_prompt


def recall(contexts: int = 20, length: int = 512, **_: Any) -> dict[str, Any]:
    """{"test": rows with "prompt" and "answer"}: five questions for each of `contexts` contexts of `length` tokens.

    lm-eval passes its `metadata` and the arguments of the model along.
    """
    rows = load_recall("test", contexts=contexts, length=length)
    return {"test": rows.map(lambda row: {"prompt": recall_prompt(row["context"], row["question"])})}


def scenes(images: int = 40, questions: int = 4, **_: Any) -> dict[str, Any]:
    """{"test": rows with "image", "question" and "answer"}: `questions` for each of `images` rendered scenes."""
    return {"test": load_scenes("test", images=images, questions=questions)}
