"""The logger as a callback of PyTorch Lightning."""

from __future__ import annotations

import sys
from typing import Any

from .logger import SolveLogger
from .optional import need
from .sinks import numbers

# It has two names, whose callbacks are two classes: the program's own is the one that is imported already.
OLD, NEW = "pytorch_lightning", "lightning.pytorch"
_lightning: Any = need(OLD if OLD in sys.modules and NEW not in sys.modules else NEW, "LightningWatch", "lightning")


class LightningWatch(_lightning.Callback):
    """Write what the solves of `Trainer.fit` did. Example::

        Trainer(callbacks=[LightningWatch("solves.csv", every=10)]).fit(module)

    A step is one of the optimizer, however many batches it accumulates. Validation is not recorded. All ranks record, so that all
    do the same work; the first writes.

    Args:
        sinks: as for `SolveLogger`; without any, rows go to the trainer's own loggers, as `deq/REGION/NAME`.
        every: steps that a row sums up, at least 1.
        sample: record only the last of these steps.
    """

    def __init__(self, *sinks: Any, every: int = 1, sample: bool = False) -> None:
        super().__init__()
        SolveLogger(every=every, sample=sample)  # says now what is wrong with it
        self.targets: tuple[Any, ...] = sinks
        self.settings: dict[str, Any] = {"every": every, "sample": sample}
        self.log: SolveLogger | None = None
        self._seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        sinks = (self.targets or (LoggersSink(trainer),)) if trainer.is_global_zero else ()
        self.log, self._seen = SolveLogger(*sinks, **self.settings), trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.log is not None:
            self.log.resume()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.log is None:
            return
        self.log.pause()
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.log.step(self._seen)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self.log is not None:
            self.log.close()
            self.log = None


class LoggersSink:
    """Rows for whatever loggers a Lightning trainer has."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __call__(self, row: dict[str, Any]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(numbers(row, "deq"), step=row["step"])
