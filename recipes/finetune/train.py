"""Fine-tune the embedded LLaVA with compressed tokens, and say what it answers at every budget.

python recipes/finetune/train.py recipes/finetune/configs/mqt.json                    # minutes on one CPU core
python recipes/finetune/train.py recipes/finetune/configs/mqt.json --max_steps 20 --limit 40 --output_dir /tmp/mqt

Every argument is one of `Recipe` or of transformers' `TrainingArguments`; a config of JSON comes first, what is
written behind it wins. In `output_dir` lie then the model with its compression, `result.json`, and alone what the
method trains.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_compress.demo import load_demo
from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate.scoring import answer, exact_match, score
from hf_compress.registry import get
from hf_compress.train import CompressionCallback, Every, Sampled, VisionTextCollator

TOKENS = 196  # of an image of the embedded LLaVA
DATA_SEED = 1  # other scenes than those that are judged by, and other objects: the splits share none


@dataclass
class Recipe:
    """What is trained, on what, and what it is judged by.

    Args:
        method: of `hf_compress.methods()`; knobs: its own arguments, in the config.
        trained: tokens per image (between layers: on average over them), one of them drawn at every step; judged: those
            at which it answers.
        schedule: one of `hf_compress.train` by its name, in place of drawing; or "every": all of `trained` at each
            step, one per micro batch (`--gradient_accumulation_steps`).
        language: train the language model and the projector too; else the method's module alone.
        language_rate: their learning rate; `learning_rate` is that of the method's module.
        images: scenes to learn from; turns: questions of each, one conversation.
        split: "train" needs scikit-image.
        limit: held-out questions to judge by, four of a scene.
    """

    method: str = "mqt"
    knobs: dict = field(default_factory=dict)  # type: ignore[type-arg]
    trained: list[int] = field(default_factory=lambda: [49, 22, 9, 1])
    judged: list[int] = field(default_factory=lambda: [49, 22, 9, 1])
    schedule: str = ""
    language: bool = True
    language_rate: float = 5e-4
    images: int = 2500
    turns: int = 6
    split: str = "train"
    limit: int = 400


class Conversations(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The questions of every scene as one conversation, its image in the first turn."""

    def __init__(self, split: str, images: int, turns: int):
        self.rows, self.turns = load_scenes(split, images=images, questions=turns, seed=DATA_SEED), turns

    def __len__(self) -> int:
        return len(self.rows) // self.turns

    def __getitem__(self, i: int) -> dict[str, Any]:
        rows = self.rows[i * self.turns : (i + 1) * self.turns]  # columns
        said = [
            {"role": role, "content": text}
            for pair in zip(rows["question"], rows["answer"])
            for role, text in zip(("user", "assistant"), pair)
        ]
        return {"messages": said, "images": rows["image"][:1]}


def ratio(keep: int) -> float:
    """The fraction removed where `keep` tokens stay."""
    return 1 - keep / TOKENS


def groups(model: Any, recipe: Recipe, rate: float) -> list[dict[str, Any]]:
    """What is trained, and how fast; all else is frozen."""
    model.requires_grad_(False)
    found = []
    if (compressor := getattr(model, "compressor", None)) is not None:
        found.append({"params": list(compressor.parameters()), "lr": rate})
    if recipe.language:
        parts = [model.model.language_model, model.model.multi_modal_projector]
        found.append({"params": [p for part in parts for p in part.parameters()], "lr": recipe.language_rate})
    for group in found:
        for p in group["params"]:
            p.requires_grad_(True)
    if not found:
        raise ValueError(f"method={recipe.method!r} trains nothing of its own; pass --language true")
    return found


def train(model: Any, processor: Any, recipe: Recipe, arguments: TrainingArguments) -> float:
    """Train; the seconds of CPU that it took."""
    optimizer = torch.optim.AdamW(groups(model, recipe, arguments.learning_rate), weight_decay=arguments.weight_decay)
    ratios = [ratio(keep) for keep in recipe.trained]
    schedule = Every(ratios) if recipe.schedule == "every" else recipe.schedule or Sampled(ratios, arguments.seed)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Conversations(recipe.split, recipe.images, recipe.turns),
        data_collator=VisionTextCollator(processor),
        callbacks=[CompressionCallback(schedule)],
        optimizers=(optimizer, None),
    )
    start = time.process_time()
    trainer.train()
    return time.process_time() - start


def judge(model: Any, processor: Any, keeps: Sequence[int], limit: int) -> dict[str, float]:
    """{tokens: accuracy} on held-out questions; `keeps` of a model that is not compressed are those of all tokens."""
    rows, out = load_scenes("test", images=-(-limit // 4), questions=4), {}
    for keep in keeps:
        if getattr(model, "compression", None) is not None:
            model.compression.set_budget(ratio(keep))
        said = answer(model, processor, rows, batch_size=50, max_new_tokens=8)
        out[str(keep)] = score(exact_match(said, rows["answer"])).accuracy
        print(f"{keep} tokens: {out[str(keep)]:.1%}", flush=True)
    return out


def arguments_of(given: Sequence[str]) -> tuple[Recipe, TrainingArguments]:
    """The config, if one comes first, and what is written behind it."""
    parser = HfArgumentParser((Recipe, TrainingArguments))  # type: ignore[arg-type]
    given = list(given)
    if given and given[0].endswith(".json"):
        config = json.loads(Path(given.pop(0)).read_text(encoding="utf-8"))
        if unknown := config.keys() - {action.dest for action in parser._actions}:
            raise ValueError(f"the config has {sorted(unknown)}, which neither Recipe nor TrainingArguments has")
        parser.set_defaults(**config)
    return parser.parse_args_into_dataclasses(given)  # type: ignore[return-value]


def main(given: Sequence[str]) -> dict[str, Any]:
    recipe, arguments = arguments_of(given)
    arguments.remove_unused_columns, arguments.report_to = False, []
    model, processor = load_demo("llava")
    set_seed(arguments.seed)
    trains = get(recipe.method).trains
    model.compress(recipe.method, ratio=ratio(recipe.judged[0]), **recipe.knobs)
    seconds = train(model, processor, recipe, arguments) if arguments.max_steps else 0.0
    if not arguments.should_save:  # of several processes one judges and writes
        return {}
    model.eval()
    result = {
        "method": recipe.method,
        "command": f"python recipes/finetune/train.py {' '.join(given)}",
        "seed": arguments.seed,
        "steps": arguments.max_steps,
        "minutes": round(seconds / 60, 1),
        "accuracy": judge(model, processor, recipe.judged, recipe.limit) if recipe.limit else {},
    }
    out = Path(arguments.output_dir)
    model.save_pretrained(out)
    if trains:
        model.compression.save(out / "compressor")
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
