"""Training loops: `train` for few CPU cores, `train_alone` for one accelerator.

The first one runs processes of one thread each, which share bf16 weights and gradients. The micro-batches of a step
are taken by whichever process is free; micro-batch i writes its gradient to row i of a shared matrix. Then every
process averages the rows, in the same order, and updates its own part of the weights, of which it keeps an fp32 copy.
So a core that others use slows the training down but does not change its result.
"""

import math
import multiprocessing
import time

import torch

PATIENCE = 900  # seconds to wait for another process before giving up
CLIP = 1.0  # longest gradient


class MasterOptimizer:
    """fp32 weights behind a bf16 model: Muon for the inner matrices, AdamW for all else.

    Args:
        named: list of (name, bf16 parameter).
        adam_lr, muon_lr: peak learning rates; no Muon where `muon_lr` is 0.
    """

    def __init__(self, named, adam_lr, muon_lr, decay=0.05):
        self.parameters = [p for _, p in named]
        self.masters = [torch.nn.Parameter(p.detach().float().clone()) for p in self.parameters]
        groups = {"muon": [], "decayed": [], "plain": []}
        for (name, p), master in zip(named, self.masters, strict=True):
            inner = p.ndim == 2 and min(p.shape) >= 64 and "embed" not in name
            kind = "muon" if inner and muon_lr else "decayed" if p.ndim >= 2 and "embed" not in name else "plain"
            groups[kind].append(master)
        adam = [{"params": groups["decayed"], "weight_decay": decay}, {"params": groups["plain"], "weight_decay": 0.0}]
        self.optimizers = [(torch.optim.AdamW(adam, lr=adam_lr, betas=(0.9, 0.98)), adam_lr)]
        if groups["muon"]:
            muon = torch.optim.Muon(
                groups["muon"], lr=muon_lr, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizers.append((muon, muon_lr))

    def step(self, gradients, scale):
        """Takes one step and writes the weights back.

        Args:
            gradients: fp32, one flat tensor per parameter.
            scale: factor of the peak learning rates.
        """
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.view_as(master)
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


def schedule(step, steps, warmup=50, end=0.02):
    """Factor of the learning rate: linear warm-up, cosine down to `end`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warmup) * (end + (1 - end) * cosine)


class _Shared:
    """What the processes share beside the weights: a ticket counter, a barrier, gradients, losses, the result."""

    def __init__(self, processes, rows, size, losses):
        self.context = multiprocessing.get_context("fork")
        self.barrier = self.context.Barrier(processes, timeout=PATIENCE)
        self.tickets = self.context.Value("l", 0)
        self.gradients = torch.zeros(rows, size, dtype=torch.bfloat16).share_memory_()
        self.losses = torch.zeros(rows, losses).share_memory_()
        self.result = torch.zeros(size).share_memory_()

    def take(self, limit):
        """The next number below `limit`, or None."""
        with self.tickets.get_lock():
            if self.tickets.value >= limit:
                return None
            self.tickets.value += 1
            return self.tickets.value - 1


def _work(rank, processes, shared, named, losses, steps, rates, log_every):
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    sizes = [p.numel() for _, p in named]
    mine = sorted(range(len(named)), key=lambda i: -sizes[i])[rank::processes]
    optimizer = MasterOptimizer([named[i] for i in mine], *rates)
    rows, start, seen = len(shared.losses), time.time(), None
    for step in range(steps):
        while (number := shared.take((step + 1) * rows)) is not None:
            parts = _backward(named, losses(number), shared.gradients[number % rows])
            shared.losses[number % rows] = torch.stack(list(parts.values()))
        shared.barrier.wait()  # all gradients are there
        gradient = shared.gradients.float().mean(0)
        gradient *= min(1.0, CLIP / (gradient.norm().item() + 1e-6))
        gradients = gradient.split(sizes)
        optimizer.step([gradients[i] for i in mine], schedule(step, steps))
        now = shared.losses.mean(0)
        seen = now if seen is None else 0.95 * seen + 0.05 * now
        shared.barrier.wait()  # all weights are written
        if rank == 0 and (step + 1) % log_every == 0:
            _log(step, steps, start, parts, seen)
    result = shared.result.split(sizes)
    for i, master in zip(mine, optimizer.masters, strict=True):
        result[i].copy_(master.detach().flatten())


def _backward(named, losses, gradient):
    """Writes the gradient of losses["total"] to `gradient`, flat; returns the losses, detached, in fp32."""
    losses["total"].backward()
    torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for _, p in named], out=gradient)
    for _, p in named:
        p.grad = None
    return {name: loss.detach().float() for name, loss in losses.items()}


def _log(step, steps, start, parts, seen):
    values = ", ".join(f"{name} {value:.4f}" for name, value in zip(parts, seen.tolist(), strict=True))
    print(f"step {step + 1}/{steps}, {time.time() - start:.0f} s: {values}", flush=True)


def train(named, losses, steps, rows, rates, processes=2, log_every=50):
    """Trains bf16 parameters in place.

    Args:
        named: list of (name, parameter), all of them bf16.
        losses: function of the micro-batch's number that returns a dict of scalars; "total" is minimised. It must
            depend on that number alone, not on what was called before.
        steps: optimiser steps.
        rows: micro-batches per step.
        rates: peak learning rates (AdamW, Muon).
        processes: how many work at the same time, one thread each.
        log_every: steps between two lines of losses, running means.

    Returns:
        the trained parameters in fp32, name -> tensor.
    """
    torch.set_num_threads(1)  # before the fork: threads do not survive it
    with torch.no_grad():
        count = len(losses(0))
    sizes = [p.numel() for _, p in named]
    shared = _Shared(processes, rows, sum(sizes), count)
    for _, p in named:
        p.data.share_memory_()
    work = []
    for rank in range(processes):
        arguments = (rank, processes, shared, named, losses, steps, rates, log_every)
        work.append(shared.context.Process(target=_work, args=arguments))
        work[-1].start()
    for process in work:
        process.join()
    if any(process.exitcode for process in work):
        raise RuntimeError("a training process failed; see the message above")
    return {name: part.view(p.shape).clone() for (name, p), part in zip(named, shared.result.split(sizes), strict=True)}


def train_alone(named, losses, steps, rows, rates, log_every=50):
    """Trains bf16 parameters in place, in this process, on the device where they are.

    Args:
        named, losses, steps, rows, rates, log_every: as of `train`; the micro-batches of a step run one by one.

    Returns:
        the trained parameters in fp32, on the CPU, name -> tensor.
    """
    optimizer, start, seen = MasterOptimizer(named, *rates), time.time(), None
    sizes = [p.numel() for _, p in named]
    gradients = named[0][1].new_zeros(rows, sum(sizes))
    with torch.no_grad():
        values = torch.zeros(rows, len(losses(0)), device=gradients.device)
    for step in range(steps):
        for row in range(rows):
            parts = _backward(named, losses(step * rows + row), gradients[row])
            values[row] = torch.stack(list(parts.values()))
        gradient, now = gradients.float().mean(0), values.mean(0)
        gradient = gradient * (CLIP / (gradient.norm() + 1e-6)).clamp(max=1.0)
        optimizer.step(gradient.split(sizes), schedule(step, steps))
        seen = now if seen is None else 0.95 * seen + 0.05 * now
        if (step + 1) % log_every == 0:
            _log(step, steps, start, parts, seen)
    return {name: master.detach().cpu() for (name, _), master in zip(named, optimizer.masters, strict=True)}
