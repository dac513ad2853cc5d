"""Train the net of the method `explainability` on an embedded demo model, and say what it is worth.

python recipes/explainability/train.py --out weights            # minutes on one CPU core
model.compress("explainability", ratio=0.75, weights="weights")
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_encoders"))
from judge import judge

from hf_compress.demo import load_demo
from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate.prompts import encode
from hf_compress.methods.vision.explainability import relevance

RIVALS = ("random", "uniform", "fastervlm")


def prompts(processor: Any, rows: Sequence[Any]) -> Iterator[Any]:
    """One prompt a row."""
    for row in rows:
        yield encode(processor, [row["image"]], [row["question"]])


def taught(model: Any, processor: Any, rows: Sequence[Any], tokens: int) -> list[Tensor]:
    """(N,) relevance of the visual tokens of every row to the answer that the model gives, of up to `tokens` tokens.

    Args:
        model: with eager attention, whose maps have gradients.
    """
    out = []
    for prompt in prompts(processor, rows):
        start = prompt["input_ids"].shape[1]
        with torch.no_grad():
            ids = model.generate(**prompt, do_sample=False, max_new_tokens=tokens)
        whole = dict(prompt, input_ids=ids, attention_mask=torch.ones_like(ids))
        seen = model(**whole, output_attentions=True)
        log = seen.logits[0, start - 1 : -1].log_softmax(-1)
        said = log.gather(1, ids[0, start:, None]).sum()
        gradients = torch.autograd.grad(said, seen.attentions)
        maps = [a[0].detach() for a in seen.attentions]
        reads = torch.arange(start - 1, ids.shape[1] - 1)
        visual = ids[0] == model.config.image_token_id
        out.append(relevance(maps, [g[0] for g in gradients], reads)[visual])
    return out


def shown(model: Any, processor: Any, rows: Sequence[Any]) -> list[Tensor]:
    """(H, N) what the net of a compressed model is shown of every row."""
    out: list[Tensor] = []
    model.requires_grad_(False).compressor.train()  # it is being trained: nobody minds that it is new
    handle = model.compressor.vision.register_forward_pre_hook(lambda _, args: out.append(args[0][0].clone()))
    try:
        for prompt in prompts(processor, rows):
            model(**prompt)
    finally:
        handle.remove()
    return out


def fit(
    net: torch.nn.Module, inputs: Tensor, teacher: Tensor, epochs: int, batch: int = 32, rate: float = 1e-3
) -> None:
    """Minimise the Kullback-Leibler divergence of the net's shares (n, N) from the teacher's.

    Args:
        inputs: (n, H, N); teacher: (n, N), at least 0.
    """
    target = teacher / teacher.sum(1, keepdim=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * -(-len(inputs) // batch))
    for epoch in range(epochs):
        losses = []
        for part in torch.randperm(len(inputs)).split(batch):
            loss = F.kl_div(net(inputs[part]).log_softmax(1), target[part], reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        print(f"epoch {epoch}: divergence {sum(losses) / len(losses):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the weights")
    parser.add_argument("--model", default="llava", choices=("llava",), help="embedded model")
    parser.add_argument("--split", default="train", help="scenes to learn from: train needs scikit-image")
    parser.add_argument("--images", type=int, default=200, help="scenes, four questions each")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--limit", type=int, default=200, help="questions of the test scenes to judge by; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    rows, start = load_scenes(given.split, images=given.images, questions=4, seed=given.seed + 1), time.time()
    teacher, processor = load_demo(given.model, attn_implementation="eager")
    relevances = torch.stack(taught(teacher, processor, rows, tokens=8))
    print(f"relevance of {len(rows)} answers: {time.time() - start:.0f} s", flush=True)
    model, _ = load_demo(given.model)
    model.compress("explainability", ratio=0.5)
    inputs = torch.stack(shown(model, processor, rows))
    fit(model.compressor.vision.requires_grad_(True), inputs, relevances, given.epochs)
    model.compression.save(given.out)
    model.decompress()
    print(f"saved to {given.out} after {time.time() - start:.0f} s", flush=True)
    if given.limit:
        judge(model, processor, dict.fromkeys(RIVALS) | {"explainability": given.out}, given.limit)


if __name__ == "__main__":
    main()
