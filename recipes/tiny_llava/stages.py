"""Stages of a recipe: done once, timed."""

import time

import torch


def stage(path, work):
    """The weights in `path`, or those that `work()` returns, which are then kept in `path`."""
    if not path.exists():
        torch.save(work(), path)
    return torch.load(path)


def minutes(report, name, start):
    """Notes how long a stage took and returns the present time, when the next one starts."""
    report["minutes"][name] = round((time.time() - start) / 60, 1)
    return time.time()
