"""The training loop: one process of one thread that can be stopped at any time and goes on where it was."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from arrays import GRID, TOKENS, Clips, visible
from model import answer
from parallel import CLIP, MasterOptimizer, schedule
from render import IGNORED

SIZE = 8  # clips per step
RATES = (1e-3, 3e-3)  # AdamW, Muon
WHOLE = 0.1  # share of the steps in which the language model sees all tokens
FEWEST, MOST = 32, 192  # tokens that it sees in the others
SAVED = 120  # seconds between two checkpoints


def losses(model, batch, rng):
    """Cross entropy of the answers of one micro-batch, and their shares of right tokens and of right answers."""
    order = torch.arange(TOKENS).expand(len(batch["seen"]), -1)
    if rng.rand() >= WHOLE:
        order = visible(batch["owner"], batch["needed"], rng, FEWEST, MOST)
    seen = batch["seen"].gather(1, order[..., None, None].expand(-1, -1, *batch["seen"].shape[2:]))
    logits, targets = answer(model, seen, order, GRID, batch["tokens"]).float(), batch["targets"]
    asked = targets != IGNORED
    right = logits.detach().argmax(-1) == targets
    return {
        "total": F.cross_entropy(logits[asked], targets[asked]),
        "tokens": right[asked].float().mean(),
        "answers": (right | ~asked).all(-1).float().mean(),
    }


def learn(model, folder, clips, steps, seed, checkpoint, log_every=25):
    """Trains merger and language model of `model` (bf16, in place) on what `encode` put into `folder`.

    Args:
        clips: how many of them.
        steps: in all; of those that `checkpoint` has seen none is repeated.
        checkpoint: file, written every two minutes and at the end.

    Returns:
        their fp32 weights, name in `model` -> tensor.
    """
    model.requires_grad_(False)
    for part in (model.model.visual.merger, model.model.language_model):
        part.requires_grad_(True)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer, batches, start, mean = MasterOptimizer(named, *RATES), Clips(folder, clips, SIZE, seed), 0, {}
    if Path(checkpoint).exists():
        start = _restore(optimizer, torch.load(checkpoint))
    clock = saved = time.time()
    for step in range(start, steps):
        found = losses(model, batches[step], np.random.RandomState([seed, step]))
        found["total"].backward()
        length = torch.nn.utils.clip_grad_norm_([p for _, p in named], CLIP)
        optimizer.step([p.grad.float() for _, p in named], schedule(step, steps))
        for _, p in named:
            p.grad = None
        mean = {name: 0.95 * mean.get(name, v.item()) + 0.05 * v.item() for name, v in found.items()}
        if (step + 1) % log_every == 0:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in mean.items())
            print(f"step {step + 1}/{steps}, {time.time() - clock:.0f} s: {shown}, gradient {length:.2f}", flush=True)
        if time.time() - saved > SAVED or step + 1 == steps:
            _save(optimizer, step + 1, checkpoint)
            saved = time.time()
    return {name: master.detach().clone() for (name, _), master in zip(named, optimizer.masters, strict=True)}


def _save(optimizer, step, path):
    """Writes beside it first: a stop leaves the one before whole."""
    state = {"step": step, "masters": [m.detach() for m in optimizer.masters]}
    state["optimizers"] = [one.state_dict() for one, _ in optimizer.optimizers]
    beside = Path(f"{path}.new")
    torch.save(state, beside)
    beside.replace(path)


@torch.no_grad()
def _restore(optimizer, state):
    for master, value in zip(optimizer.masters, state["masters"], strict=True):
        master.copy_(value)
    for (one, _), saved in zip(optimizer.optimizers, state["optimizers"], strict=True):
        one.load_state_dict(saved)
    torch._foreach_copy_(optimizer.parameters, optimizer.masters)
    return state["step"]
