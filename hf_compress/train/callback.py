"""A callback of `Trainer` that sets the budget of a compressed model step by step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_compress.api import bare
from hf_compress.engine.runtime import Compression
from hf_compress.train.schedules import RatioSchedule, schedule_of

KEY = "compression_ratio"  # of the logs


class CompressionCallback(TrainerCallback):  # type: ignore[misc]
    """The ratio of a compressed model follows a schedule while `Trainer` trains it.

    It is lent once per optimiser step, before the first micro batch, and stands until the step is done: the layers that
    gradient checkpointing recomputes see the same one. It follows from the step alone, so that all ranks have the same,
    and a resumed run goes on as if it had never stopped. Between steps, and in `eval()` at any time, the model has the
    budget that `compress` was given: evaluations are comparable, and checkpoints say what the user asked for, also
    where a step broke off. A log of a loss has its mean ratio, under "compression_ratio", in the history of the state
    and for the callbacks behind this one.

    Args:
        schedule: `Fixed`, `Linear`, `Stages`, `Sampled` or `Every`, a ratio, or "llavolta": four equal stages that
            remove 82, 47, 25 and 0 % of the visual rows of all layers (arXiv:2406.20092). What the paper pools at
            layers 2 and 16 of 32 leaves here where and how the method says; the cost per step is the same.
        method: whose budget, where there are several.

    Raises (when the training begins):
        ValueError: the model is not compressed, the method cannot vary, or it cannot reach a ratio of the schedule;
            steps do not have a micro batch for every ratio of `Every`.
    """

    def __init__(self, schedule: RatioSchedule | float | str, method: str | None = None):
        self.schedule, self.method = schedule_of(schedule), method
        self._since: list[float] = []
        self._micro = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check every ratio that will come."""
        compression, self._since = self._compression(model), []
        if (micro := args.gradient_accumulation_steps) % self.schedule.parts:
            raise ValueError(
                f"schedule={self.schedule} has a ratio for each of {self.schedule.parts} micro batches of a step, and "
                f"gradient_accumulation_steps={micro} is no multiple of them"
            )
        try:
            for ratio in self.schedule.bounds:
                compression.lend(ratio, method=self.method)
        except ValueError as error:
            raise ValueError(f"schedule={self.schedule}: {error}") from error
        finally:
            compression.take_back()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The ratio of the first micro batch of this step."""
        self._micro = 0
        self._set(state, model)

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """That of the next micro batch."""
        self._micro += 1
        if self.schedule.parts > 1:
            self._set(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Between steps the model is as it was asked for."""
        self._compression(model).take_back()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Beside the loss, the mean ratio of the steps that it is the mean of."""
        if logs is None or "loss" not in logs or not self._since:
            return
        logs[KEY] = sum(self._since) / len(self._since)
        state.log_history[-1][KEY] = logs[KEY]
        self._since = []

    def _set(self, state: Any, model: Any) -> None:
        ratio = self.schedule.within(state.global_step, state.max_steps, self._micro)
        self._since.append(ratio)
        self._compression(model).lend(ratio, method=self.method)

    def _compression(self, model: Any) -> Compression:
        found = getattr(bare(model), "compression", None)
        if found is None:
            raise ValueError(
                f"model={type(model).__name__} is not compressed, so that no schedule can change its ratio; call "
                "model.compress(...) before Trainer is made"
            )
        return found
