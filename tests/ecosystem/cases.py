"""What every test of the life beside the ecosystem shares: compressions of all stages, and what counts as equal."""

from __future__ import annotations

from typing import Any

import torch

import hf_compress
from tests.tiny import GREEDY, Batch


def config(**ratios: float) -> dict[str, Any]:
    """`config(fastv=0.4)`: a compression config with one ratio per method, and the knobs of its example."""
    knobs = {m: {k: v for k, v in hf_compress.methods()[m].example.items() if k != "ratio"} for m in ratios}
    return {"methods": [{"method": m, "ratio": r, "knobs": knobs[m]} for m, r in ratios.items()]}


# Every kind of hook that the engine has: on the features, inside the tower, between decoder layers, on the cache.
CONFIGS = {
    "features": config(fastervlm=0.5),
    "tower": config(tome=0.5),
    "layers": config(fastv=0.4),
    "cache": config(h2o=0.5),
    "stack": config(visionzip=0.5, fastv=0.4, snapkv=0.3),
}
STACK = CONFIGS["stack"]


@torch.no_grad()
def logits(model: Any, batch: Batch) -> torch.Tensor:
    """(B, L, V) of one forward."""
    return model(**batch).logits


def tokens(model: Any, batch: Batch, **kwargs: Any) -> torch.Tensor:
    """(B, T) generated greedily."""
    return model.generate(**batch, **GREEDY, **kwargs)[:, batch["input_ids"].shape[1] :]


def outputs(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one forward, and logits of every step of a greedy generate."""
    run = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    return logits(model, batch), torch.stack(run.logits, 1)


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], atol: float = 5e-5) -> bool:
    """Equal up to rounding: equal weights elsewhere in memory already round otherwise. A wrong row changes 0.1."""
    return all(torch.allclose(x, y, rtol=0, atol=atol) for x, y in zip(a, b))


def hooks(model: torch.nn.Module) -> dict[str, tuple[int, int, list[str]]]:
    """Per module the number of forward hooks and pre-hooks, and the names in its `__dict__`."""
    return {
        path: (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for path, m in model.named_modules()
    }
