"""How much a compressed model learns from the uncompressed one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from hf_compress.methods.knobs import check_number


@dataclass(frozen=True)
class Distill:
    """`weight` * T^2 * KL(teacher || student) of the distributions softened by T = `temperature`, beside the loss.

    Mean over the tokens that have labels, or their sum over `num_items_in_batch`, as the loss itself.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("weight", self.weight, 0)
        check_number("temperature", self.temperature, 0, above=True)

    @classmethod
    def of(cls, value: Distill | float | Mapping[str, float] | None) -> Distill | None:
        """None for no distillation; a number is the weight; the two numbers by name, as configs have them.

        Raises:
            ValueError: it is something else.
        """
        if value is None or isinstance(value, Distill):
            return value
        if isinstance(value, Mapping) and set(value) <= {field.name for field in fields(cls)}:
            return cls(**value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"distill={value!r} must be a weight, or a hf_compress.train.Distill")
        return cls(float(value))
