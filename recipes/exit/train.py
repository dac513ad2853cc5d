"""Train the routers of the method `dyvte` on an embedded demo model, and say what they are worth.

python recipes/exit/train.py --out weights            # minutes on one CPU core
model.compress("dyvte", ratio="adaptive", weights="weights")
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.demo import load_demo
from hf_compress.demo.dataset import load_scenes
from hf_compress.evaluate.prompts import encode

NEVER = -1e4  # a bias under which no router lets anything leave
BIASES = (-2.0, 0.0, 2.0)
SLACK = 0.01  # nats: of answers that the model is sure of 1.03 times the loss is nothing


def prompts(processor: Any, rows: Sequence[Any]) -> Iterator[Any]:
    """One prompt a row."""
    for row in rows:
        yield encode(processor, [row["image"]], [row["question"]])


@torch.no_grad()
def answers(model: Any, processor: Any, rows: Sequence[Any], tokens: int) -> list[dict[str, Any]]:
    """Each prompt with what the bare model answers behind it, as labels."""
    out = []
    for prompt in prompts(processor, rows):
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=tokens)
        labels = ids.clone()
        labels[:, : prompt["input_ids"].shape[1]] = -100
        out.append(dict(prompt, input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels))
    return out


@torch.no_grad()
def said(model: Any, batch: dict[str, Any]) -> tuple[float, Tensor]:
    """The loss of the answer, and what the model would say at each of its places."""
    out, mine = model(**batch), batch["labels"][0, 1:] != -100
    return float(out.loss), out.logits[0, :-1].argmax(-1)[mine]


def taught(model: Any, batches: Sequence[dict[str, Any]], layers: int) -> Tensor:
    """(n, layers - 1): 1 where an answer is the same, and as sure, when all visual rows leave before layer 1, 2 ..."""
    whole = [said(model, batch) for batch in batches]
    columns = []
    for layer in range(1, layers):
        with model.compressed("dyvte", ratio=1 - layer / layers):
            short = [said(model, batch) for batch in batches]
        columns.append([b[1].equal(a[1]) and b[0] < 1.03 * a[0] + SLACK for a, b in zip(whole, short)])
    return torch.tensor(columns).T.long()


def shown(model: Any, batches: Sequence[dict[str, Any]]) -> list[Tensor]:
    """(n, 2 D) for each router of a compressed model: what it is shown of every prompt."""
    out: list[list[Tensor]] = [[] for _ in model.compressor.decoder]
    model.requires_grad_(False).compressor.train()  # it is being trained: nobody minds that it is new
    handles = [
        router.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0].detach().clone()))
        for router, seen in zip(model.compressor.decoder, out)
    ]
    try:
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.stack(seen) for seen in out]


def fit(router: torch.nn.Module, inputs: Tensor, labels: Tensor, epochs: int, rate: float = 3e-4) -> float:
    """Lower the cross-entropy of one router on inputs (n, 2 D), labels (n,); returns how many it gets right."""
    optimizer = torch.optim.AdamW(router.requires_grad_(True).parameters(), lr=rate, weight_decay=0.1)
    for _ in range(epochs):
        for part in torch.randperm(len(inputs)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(router(inputs[part]), labels[part]).backward()
            optimizer.step()
    return float((router(inputs).argmax(-1) == labels).float().mean())


@torch.no_grad()
def judge(model: Any, processor: Any, rows: Sequence[Any]) -> tuple[float, float]:
    """The share of right answers, and the mean share of visual rows that layers were spared."""
    right, removed = 0, 0.0
    for row, prompt in zip(rows, prompts(processor, rows)):
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=8)[0, prompt["input_ids"].shape[1] :]
        right += processor.decode(ids, skip_special_tokens=True).strip() == row["answer"]
        if (compression := model.compression) is not None:
            sizes, visual = compression.last.layer_tokens, sum(compression.last.visual_tokens[0])
            removed += sum(sizes[0][0] - n for (n,) in sizes) / visual / len(sizes)
    return right / len(rows), removed / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the weights")
    parser.add_argument("--split", default="train", help="scenes to learn from: train needs scikit-image")
    parser.add_argument("--images", type=int, default=100, help="scenes, four questions each")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--limit", type=int, default=100, help="questions of the test scenes to judge by; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    rows, start = load_scenes(given.split, images=given.images, questions=4, seed=given.seed + 1), time.time()
    model, processor = load_demo("llava")
    layers = model.config.get_text_config().num_hidden_layers
    batches = answers(model, processor, rows, tokens=8)
    labels = taught(model, batches, layers)
    print(f"{len(rows)} answers, {time.time() - start:.0f} s; the same without images before layer 1, 2 ...:", end=" ")
    print([round(share, 3) for share in labels.float().mean(0).tolist()], flush=True)
    model.compress("dyvte", ratio="adaptive", bias=NEVER)
    for layer, (inputs, router) in enumerate(zip(shown(model, batches), model.compressor.decoder)):
        right = fit(router, inputs, labels[:, layer], given.epochs)
        print(f"router behind layer {layer}: {right:.1%} of the training answers", flush=True)
    model.eval().compression.save(given.out)
    model.decompress()
    print(f"saved to {given.out} after {time.time() - start:.0f} s", flush=True)
    test = load_scenes("test", images=-(-given.limit // 4), questions=4) if given.limit else []
    if given.limit:
        print(f"all tokens: {judge(model, processor, test)[0]:.1%} right", flush=True)
    for bias in BIASES if given.limit else ():
        with model.compressed("dyvte", ratio="adaptive", bias=bias, weights=given.out):
            right, removed = judge(model, processor, test)
        print(f"bias {bias}: {right:.1%} right, {removed:.1%} removed", flush=True)


if __name__ == "__main__":
    main()
