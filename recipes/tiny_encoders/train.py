"""Train the module of a vision method on the embedded LLaVA, by the model's own loss, and say what it is worth.

python recipes/tiny_encoders/train.py --method sts --out weights            # minutes on one CPU core
model.compress("sts", ratio=0.89, weights="weights")
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from judge import judge

from hf_compress.demo import load_demo
from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate.prompts import encode

RIVALS = ("random", "uniform", "avgpool")


def examples(processor: Any, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Prompts with their answers behind them, and labels on the answers."""
    tokenizer = processor.tokenizer
    batch = dict(encode(processor, [row["image"] for row in rows], [row["question"] for row in rows]))
    said = [tokenizer(row["answer"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for row in rows]
    longest = max(map(len, said))
    ids = torch.tensor([x + [tokenizer.pad_token_id] * (longest - len(x)) for x in said])
    real = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in said])
    nothing = torch.full_like(batch["input_ids"], -100)
    batch["labels"] = torch.cat([nothing, ids.masked_fill(real == 0, -100)], 1)
    batch["input_ids"] = torch.cat([batch["input_ids"], ids], 1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], real], 1)
    return batch


def fit(model: Any, processor: Any, rows: Any, steps: int, batch: int, rate: float) -> None:
    """Train `model.compressor` and nothing else."""
    model.requires_grad_(False).train()
    model.compressor.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.compressor.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    order = torch.cat([torch.randperm(len(rows)) for _ in range(-(-steps * batch // len(rows)))])
    losses = []
    for step, part in enumerate(order[: steps * batch].split(batch)):
        loss = model(**examples(processor, [rows[int(i)] for i in part]), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.compressor.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            print(f"step {step + 1}: loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="sts", help="a vision method that trains a module")
    parser.add_argument("--out", required=True, help="folder for the weights")
    parser.add_argument("--ratio", type=float, default=0.89, help="trained with; the weights go with any")
    parser.add_argument("--images", type=int, default=2000, help="scenes to learn from, four questions each")
    parser.add_argument("--split", default="train", help="train needs scikit-image")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--limit", type=int, default=200, help="questions of the test scenes to judge by; 0: none")
    parser.add_argument("--rivals", action="store_true", help=f"judge {', '.join(RIVALS)} too")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    rows, start = load_scenes(given.split, images=given.images, questions=4, seed=given.seed + 1), time.time()
    model, processor = load_demo("llava")
    model.compress(given.method, ratio=given.ratio)
    fit(model, processor, rows, given.steps, given.batch, given.rate)
    model.compression.save(given.out)
    model.decompress()
    print(f"saved to {given.out} after {time.time() - start:.0f} s", flush=True)
    if given.limit:
        judge(model, processor, dict.fromkeys(RIVALS if given.rivals else ()) | {given.method: given.out}, given.limit)


if __name__ == "__main__":
    main()
