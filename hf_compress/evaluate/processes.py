"""Several processes at one sweep, started by torchrun, `accelerate launch` or mpirun, with or without accelerators."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # the others wait while the first process loads a model, or takes the times


def join_processes(device: Any = None) -> Any:
    """The `accelerate.PartialState` of this process among those that were started together with it.

    Args:
        device: where the model will be; None: on an accelerator where there is one.

    Raises:
        ValueError: there are more processes than accelerators for them.
    """
    found = getattr(torch, "accelerator", torch.cuda)  # torch before 2.6 knows CUDA only
    if device is not None:
        kind = torch.device(device).type
    elif parse_flag_from_env("ACCELERATE_USE_CPU") or not found.is_available():  # the flag: accelerate launch --cpu
        kind = "cpu"
    else:
        kind = "mps" if torch.backends.mps.is_available() else "accelerator"
    by_cpu = kind in ("cpu", "mps")  # accelerate knows no channel between processes on mps: they talk as on a CPU
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not by_cpu and here > found.device_count():
        raise ValueError(
            f"{here} processes for {found.device_count()} accelerators: start one for each, or pass device='cpu'"
        )
    return PartialState(cpu=by_cpu, timeout=PATIENCE)


def default_device(state: Any) -> torch.device:
    """The accelerator of this process, or the CPU where there is none."""
    if state.num_processes > 1 or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return state.device
    return state.default_device  # not what the first state of this process was made for


def on_main(state: Any, act: Callable[[], T]) -> T:
    """What the first process finds, or raises, in all of them."""
    if state.num_processes == 1:
        return act()
    box: list[Any] = [None, None]
    if state.is_main_process:
        try:
            box[0] = act()
        except Exception as error:
            box[1] = error
    broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]
