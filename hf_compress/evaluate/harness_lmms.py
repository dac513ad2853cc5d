"""What lmms-eval imports for `--model hf_compress`: it takes class paths, and asks the class to build the model."""

from __future__ import annotations

from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_eval.utils import simple_parse_args_string

from hf_compress.evaluate.harness import compressing


class Simple(lmms):
    """Builds the model class that the argument `base` names, compressed; the one without chat messages."""

    is_simple = True

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """As in lmms-eval.

        Raises:
            ValueError: `base` is missing or unknown; or see `compressing`.
        """
        arguments = simple_parse_args_string(arg_string)
        base = arguments.pop("base", None)
        if base is None:
            raise ValueError(
                "base=None: name the lmms-eval model that is compressed, as in base=llava_hf,pretrained=PATH"
            )
        further = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return compressing(get_model(base, force_simple=cls.is_simple))(**arguments, **further)


class Chat(Simple):
    """The same for models that take chat messages, which lmms-eval prefers unless it is called with --force_simple."""

    is_simple = False
