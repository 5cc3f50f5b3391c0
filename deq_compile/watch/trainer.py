"""The logger as a callback of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from .logger import SolveLogger
from .optional import need

_transformers: Any = need("transformers", "TrainerWatch", "transformers accelerate")


class TrainerWatch(_transformers.TrainerCallback):
    """Write what the solves of `Trainer.train` did. Example::

        Trainer(model, args, train_dataset=data, callbacks=[TrainerWatch("solves.csv", every=10)]).train()

    A step is one of the optimizer, however many batches it accumulates. Evaluation is not recorded. All ranks record, so that all
    do the same work; the first writes.

    Args:
        sinks: as for `SolveLogger`.
        every: steps that a row sums up, at least 1.
        sample: record only the last of these steps.

    Raises:
        ValueError: no sink.
    """

    def __init__(self, *sinks: Any, every: int = 1, sample: bool = False) -> None:
        if not sinks:
            raise ValueError("TrainerWatch: expected a sink, got none. Fix: TrainerWatch('solves.csv')")
        SolveLogger(every=every, sample=sample)  # says now what is wrong with it
        self.targets: tuple[Any, ...] = sinks
        self.settings: dict[str, Any] = {"every": every, "sample": sample}
        self.log: SolveLogger | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()  # of a training that an exception ended
        self.log = SolveLogger(*(self.targets if state.is_world_process_zero else ()), **self.settings)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.log is not None:
            self.log.resume()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.log is not None:
            self.log.pause()
            self.log.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the recording. A training that ends by itself does so; the Trainer does not tell callbacks of an exception."""
        if self.log is not None:
            self.log.close()
            self.log = None
