"""One side of the comparison, in its own environment: `python -m benchmarks.peers.worker ours|theirs FOLDER`.

Reads requests from stdin, a JSON list [name, *arguments] a line, and answers with one line of JSON. FOLDER holds the
model and `prompts.json`.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import sys
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from benchmarks.peers.cases import CASES


class Side:
    """The model and the prompts; what is done to it is up to `enter`."""

    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self, folder: Path):
        logging.disable_progress_bar()
        self.models = {
            kind: AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation=kind).eval()
            for kind in ("sdpa", "eager")
        }
        prompts = json.loads((folder / "prompts.json").read_text())
        self.prompts = [torch.tensor([ids]) for ids in prompts]
        self.model, self.stack, self.cache = self.models["sdpa"], ExitStack(), DynamicCache()
        taken = inspect.signature(type(self.model).forward).parameters
        self.argument = "cache" if "cache" in taken else "past_key_values"  # its name before transformers 5.24

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in self.packages}

    def clock(self) -> float:
        return time.process_time()

    def collect(self) -> None:
        """Free what is left of the run before; the garbage collector is off otherwise."""
        gc.collect()

    def select(self, case: int | None, ratio: float = 0.0) -> None:
        """What the next prefills use: a case of `CASES`, or the bare model."""
        self.stack.close()
        self.model = self.models["sdpa"]
        if case is not None:
            self.enter(CASES[case], ratio)

    def enter(self, case: Any, ratio: float) -> None:
        raise NotImplementedError

    def prefill(self, prompt: int, length: int | None = None) -> None:
        """Read the first `length` tokens of a prompt, or all of it."""
        self.cache = DynamicCache(config=self.model.config)
        self._read(self.prompts[prompt][:, :length])

    def steps(self, number: int) -> None:
        """Read so many tokens more, one by one."""
        for _ in range(number):
            self._read(self.prompts[0][:, :1])

    @torch.inference_mode()
    def _read(self, ids: torch.Tensor) -> None:
        self.model(ids, use_cache=True, logits_to_keep=1, **{self.argument: self.cache})

    def storages(self) -> int:
        """Bytes that the keys and values of the cache hold, shared storages once."""
        tensors = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def keys(self) -> list[float]:
        """Of the bare model: sum of the keys of every layer, to see that both sides run the same model."""
        return [layer.keys.double().abs().sum().item() for layer in self.cache.layers]


class Ours(Side):
    packages = (*Side.packages, "hf-compress")

    def enter(self, case: Any, ratio: float) -> None:
        compressed = importlib.import_module("hf_compress").compressed
        self.stack.enter_context(compressed(self.model, case.method, ratio, **case.knobs))

    def kept(self) -> tuple[list[list[list[int]]], int]:
        """Per layer and KV head the kept entries, ascending; and the bytes that the cache holds, indices included."""
        heads, out = self.model.config.num_key_value_heads, []
        for layer in self.cache.layers:
            index, valid = layer.layout.index[0], layer.layout.valid[0]
            rows = zip(index.expand(heads, -1), valid.expand(heads, -1))
            out.append([sorted(i[v].tolist()) for i, v in rows])
        return out, self.model.compression.report().totals()["kv_bytes"]


class Theirs(Side):
    packages = (*Side.packages, "kvpress")

    def enter(self, case: Any, ratio: float) -> None:
        kvpress = importlib.import_module("kvpress")
        self.model = self.models[case.attention]
        press = getattr(kvpress, case.press)(compression_ratio=ratio, **case.options)
        if case.wrapper is not None:
            press = getattr(kvpress, case.wrapper[0])(press, **case.wrapper[1])
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None  # what an earlier press left behind
        self.stack.enter_context(press(self.model))

    def kept(self) -> tuple[list[list[list[int]]], int]:
        """As in `Ours`. Gathered keys are found again by comparing them with those of the bare model."""
        cache, length = self.cache, self.prompts[0].shape[1]
        masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers]
        held = self.storages()
        if any(mask is not None for mask in masked):
            return [self._unmasked(mask, length) for mask in masked], held
        found = []
        for layer, keys in zip(cache.layers, self.full):
            same = (layer.keys[0][:, :, None] == keys[0][:, None]).all(-1)  # (Hkv, kept, length)
            if not bool((same.sum(-1) == 1).all()):
                raise ValueError("keys of the compressed cache are not those of the bare model, or not unique")
            found.append([sorted(row.tolist()) for row in same.int().argmax(-1)])
        return found, held

    def _unmasked(self, mask: Any, length: int) -> list[list[int]]:
        keep = torch.ones(self.model.config.num_key_value_heads, length, dtype=torch.bool)
        keep[mask[1], mask[2]] = False
        return [row.nonzero()[:, 0].tolist() for row in keep]

    def reference(self, prompt: int, case: int) -> None:
        """Keep the keys of the bare model for `kept`, by the attention that the case runs with."""
        self.select(None)
        self.model = self.models[CASES[case].attention]
        self.prefill(prompt)
        self.full = [layer.keys for layer in self.cache.layers]


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.set_num_threads(1)
    gc.disable()  # see `collect`
    side = {"ours": Ours, "theirs": Theirs}[sys.argv[1]](Path(sys.argv[2]))
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(side, name)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
