"""lm-eval and lmms-eval on compressed models: their own command, with `compress=` among the model arguments.

    python -m hf_compress.evaluate.harness lm_eval --model hf-compress \
        --model_args pretrained=PATH,compress=snapkv,ratio=0.5 --tasks ...
    python -m hf_compress.evaluate.harness lmms_eval --model hf_compress \
        --model_args base=qwen2_5_vl,pretrained=PATH,compress=divprune,ratio=0.75 --tasks ...

Everything after the name of the harness is passed on to it. Neither harness is needed to import this module, nor
installed with the package. From Python: `register("lm_eval")`, then `lm_eval.simple_evaluate("hf-compress", ...)`.
`recipes/harness/README.md` shows complete runs.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from transformers import PreTrainedModel

from hf_compress import registry
from hf_compress.api import Methods, compress
from hf_compress.config import CompressionConfig

QUESTION = "?"  # stands for one in a template
ARGUMENTS = ("compress", "ratio", "keep")  # of the model, besides the knobs of the methods
Request = tuple[Methods, Any, Any, dict[str, Any]]


def split_arguments(arguments: Mapping[str, Any]) -> tuple[Request, dict[str, Any]]:
    """Model arguments of a harness, parted into those of `compress` and the others.

    Args:
        arguments: by name. "compress" is a method or several joined by a plus sign (`divprune+snapkv`), "ratio" and
            "keep" one number, or one per method joined likewise (`0.75+0.5`); every knob of the methods may stand
            beside them. "compress" may be a whole config instead, as `CompressionConfig.to_dict()` or `to_json()` gives
            it.

    Returns:
        (method, ratio, keep, knobs) for `compress`, and what is left.

    Raises:
        ValueError: "compress" is missing or no method, or a number cannot be read.
    """
    rest = dict(arguments)
    method, ratio, keep = (rest.pop(name, None) for name in ARGUMENTS)
    if isinstance(method, str) and method.startswith("{"):
        method = CompressionConfig.from_json(method)
    if isinstance(method, (dict, CompressionConfig)):
        return (method, ratio, keep, {}), rest
    if not isinstance(method, str):
        raise ValueError(
            f"compress={method!r}: name a method, such as compress=snapkv,ratio=0.5, or several with a plus sign "
            f"between them; there are {', '.join(registry.methods())}"
        )
    names = method.split("+")
    known = {knob for name in names for knob in registry.get(name).knobs}
    knobs = {name: rest.pop(name) for name in known & rest.keys()}
    return (names, _numbers("ratio", ratio, float), _numbers("keep", keep, int), knobs), rest


def _numbers(name: str, value: Any, kind: Callable[[str], Any]) -> Any:
    """A number as it is, "0.75+0.5" as one number per method."""
    if not isinstance(value, str):
        return value
    try:
        return [kind(part) for part in value.split("+")]
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: give one number, or one per method as in {name}=0.75+0.5") from error


def compressing(base: type) -> type:
    """A subclass of a model class of either harness that compresses its `model` once the model is loaded.

    Its constructor takes the arguments of `split_arguments` besides those of `base`. Requests that score given
    continuations are refused under a cache method: they are one forward over prompt and continuation, in which no cache
    is read, so that the result would be that of the uncompressed model. The chat template of the model is applied once:
    to prompts that are rendered already it is refused, and where it is left out of others a warning says so.

    Raises (in the constructor):
        ValueError: as `split_arguments` and `compress`; an argument is a knob of a method and of `base`; `base` has no
            Hugging Face model, such as clients of a server.
    """

    class Compressing(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            (method, ratio, keep, knobs), rest = split_arguments(kwargs)
            _check_names(base, [*ARGUMENTS, *knobs])
            super().__init__(*args, **rest)
            if not isinstance(model := getattr(self, "model", None), PreTrainedModel):
                raise ValueError(
                    f"{base.__name__}.model is {type(model).__name__}, not a Hugging Face model that runs in this "
                    "process; use a model class that loads one by from_pretrained"
                )
            compress(model, method, ratio, keep=keep, **knobs)
            self.templated = False

        def generate_until(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
            if not self.templated and (frame := self._frame()):
                _warn_if_bare(requests, frame)
            out = super().generate_until(requests, *args, **kwargs)
            _warn_if_idle(self.model, requests)
            return out

        def loglikelihood(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
            _refuse_cache(self.model, requests)
            out = super().loglikelihood(requests, *args, **kwargs)
            _warn_if_idle(self.model, requests)
            return out

        def loglikelihood_rolling(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
            _refuse_cache(self.model, requests)
            out = super().loglikelihood_rolling(requests, *args, **kwargs)
            _warn_if_idle(self.model, requests)
            return out

        def apply_chat_template(self, chat_history: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
            _refuse_rendered(chat_history, self._frame())
            self.templated = True
            return super().apply_chat_template(chat_history, *args, **kwargs)

        def _frame(self) -> str:
            """What the model's chat template writes after a question; "" where it has none."""
            reader = getattr(self, "processor", None) or getattr(self, "tokenizer", None)
            if not hasattr(base, "apply_chat_template") or not getattr(reader, "chat_template", None):
                return ""
            text = str(super().apply_chat_template([{"role": "user", "content": QUESTION}]))
            return text.rpartition(QUESTION)[2].strip()

    Compressing.__name__ = Compressing.__qualname__ = f"Compressing{base.__name__}"
    return Compressing


def _check_names(base: type, names: list[str]) -> None:
    taken = {name for cls in base.__mro__ for name in inspect.signature(cls.__init__).parameters}  # type: ignore[misc]
    if clash := sorted(taken & set(names)):
        raise ValueError(
            f"{clash[0]} is an argument of {base.__name__} and of the compression; pass the compression as one config: "
            'compress={"methods": [{"method": ..., "ratio": ..., "knobs": {...}}]}'
        )


def _refuse_rendered(chat_history: list[dict[str, Any]], frame: str) -> None:
    """Raises ValueError if the chat template would be applied to a prompt that it, or one like it, has written."""
    said = chat_history[-1]["content"] if chat_history else None
    if frame and isinstance(said, str) and said.rstrip().endswith(frame):
        raise ValueError(
            f"the prompts of this task are rendered already: they end with {frame!r}, which the chat template of the "
            "model writes once more. Leave out --apply_chat_template, or let doc_to_text give the bare question"
        )


def _warn_if_bare(requests: list[Any], frame: str) -> None:
    """Say so where questions reach a chat model without its template."""
    asked = [args[0] for request in requests if (args := getattr(request, "args", None)) and isinstance(args[0], str)]
    if bare := [text for text in asked if not text.rstrip().endswith(frame)]:
        warnings.warn(
            f"{len(bare)} of {len(requests)} prompts do not end with {frame!r}, as the chat template of the model "
            "would have them; add --apply_chat_template",
            stacklevel=3,
        )


def _refuse_cache(model: Any, requests: list[Any]) -> None:
    """Raises ValueError if scoring `requests` would leave a requested cache method out."""
    method = model.compression.context.cache_method
    if requests and method is not None:
        tasks = sorted({str(getattr(request, "task_name", None)) for request in requests})
        raise ValueError(
            f"tasks {tasks} score given continuations (loglikelihood) in one forward, in which the cache method of "
            f"{model.compression.config.summary()} does nothing: the result would be that of the full cache. Use tasks "
            "that generate (output_type: generate_until), or a vision or decoder method"
        )


def _warn_if_idle(model: Any, requests: list[Any]) -> None:
    """Say so where the last batch gave a method nothing to act on."""
    compression, problem = model.compression, None
    if requests and (run := compression.last) is None:
        problem = "no prompt went through the model (some models of lmms-eval log errors and answer with nothing)"
    elif requests and compression.context.visual.images and not sum(map(sum, run.visual_tokens)):
        problem = "no image in the last batch, so that no visual token was removed"
    if problem:
        warnings.warn(f"{compression.config.summary()}: {problem}", stacklevel=3)


def register(harness: str) -> None:
    """Make the compressed models known to a harness of this process; once more changes nothing.

    "lm_eval": `hf-compress` and `hf-compress-multimodal`, which are its `hf` and `hf-multimodal`. "lmms_eval":
    `hf_compress`, whose argument `base` names any of its models that run in the process (`base=llava_hf`).

    Raises:
        ValueError: there is no bridge to such a harness.
        ImportError: it is not installed.
    """
    if harness == "lm_eval":
        models = import_module("lm_eval.api.registry")
        hf, vlm = (
            import_module("lm_eval.models.huggingface").HFLM,
            import_module("lm_eval.models.hf_vlms").HFMultimodalLM,
        )
        for name, base in {"hf-compress": hf, "hf-compress-multimodal": vlm}.items():
            if name not in models.model_registry:
                models.register_model(name)(compressing(base))
    elif harness == "lmms_eval":
        models = import_module("lmms_eval.models")
        paths = [f"hf_compress.evaluate.harness_lmms.{kind}" for kind in ("Simple", "Chat")]
        models.MODEL_REGISTRY_V2.register_manifest(models.ModelManifest("hf_compress", *paths))
    else:
        raise ValueError(f"harness={harness!r}: there are bridges to {', '.join(COMMANDS)}")


COMMANDS = {"lm_eval": ("lm_eval.__main__", "cli_evaluate"), "lmms_eval": ("lmms_eval.cli.dispatch", "main")}


def main(arguments: list[str]) -> Any:
    """Run the command of a harness, `arguments[0]`, with the others, after `register`.

    Raises:
        SystemExit: with a usage message, if the harness is unknown or not installed.
    """
    if not arguments or arguments[0] not in COMMANDS:
        raise SystemExit(
            f"usage: python -m hf_compress.evaluate.harness {{{','.join(COMMANDS)}}} ARGUMENTS...\n{__doc__}"
        )
    module, function = COMMANDS[arguments[0]]
    try:
        register(arguments[0])
        command = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        name = arguments[0].replace("_", "-")
        raise SystemExit(f"{error}: pip install {name} (recipes/harness/README.md says which versions work)") from error
    sys.argv = list(arguments)
    return command()


if __name__ == "__main__":
    main(sys.argv[1:])
