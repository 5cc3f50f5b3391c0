"""The logger: records between two calls of `step` become rows."""

from __future__ import annotations

import contextlib
import types
from typing import Any

from ..region.records import SolveRecord, record_solves
from .rows import Names, rows_of
from .sinks import Sink, sink_of


class SolveLogger:
    """Write what the solves of a training did, one row a region every few steps.

    Everything that runs in the process between `start` and `close` is recorded, as by `record_solves`, but for what runs between
    `pause` and `resume`; in a run on several ranks each has a logger of its own. Used as a context manager, it starts and closes
    itself. Steps that were finished are written whatever ends the block; records of a step that was not are dropped. Example::

        with SolveLogger("solves.csv", every=10) as log:
            for x, y in batches:
                train_one(x, y)
                log.step()

    Args:
        sinks: where rows go: paths of CSV files, `TensorBoardSink`, `WandbSink`, or any callable that takes a row (a dict with
            the entries of `COLUMNS`).
        every: steps that a row sums up, at least 1.
        sample: record only the last of these steps, at a fraction of the cost. Rows are of that step alone.

    Raises:
        TypeError: a sink that is none of these.
        ValueError: `every` is no positive integer.
    """

    def __init__(self, *sinks: Any, every: int = 1, sample: bool = False) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"SolveLogger: expected every to be a positive integer, got {every!r}")
        self.every, self.sample = every, sample
        self.sinks: list[Sink] = [sink_of(sink) for sink in sinks]
        self._names = Names()
        self._running: list[SolveRecord] = []  # of the block that is open now
        self._current: list[SolveRecord] = []  # of this step, from blocks that were paused
        self._finished: list[SolveRecord] = []  # of the steps of this row
        self._block = contextlib.ExitStack()
        self._wanted, self._recording = False, False
        self._last, self._steps = 0, 0

    def start(self) -> SolveLogger:
        """Begin to record."""
        self.resume()
        return self

    def resume(self) -> None:
        """Record again after `pause`. Nothing happens where recording is on."""
        self._wanted = True
        self._adjust()

    def pause(self) -> None:
        """Record nothing until `resume`: an evaluation is no part of a training step. The step's own records stay."""
        self._wanted = False
        self._adjust()

    def _adjust(self) -> None:
        """Begin or end to record, as this step asks for."""
        due = self._wanted and (not self.sample or self._steps == self.every - 1)
        if due and not self._recording:
            self._running = self._block.enter_context(record_solves())
        elif self._recording and not due:
            self._block.close()
            self._current += self._running
            self._running = []
        self._recording = due

    def step(self, number: int | None = None) -> None:
        """A training step is finished, backward included: its records belong to `number`, by default the last one plus one."""
        self._last = self._last + 1 if number is None else int(number)
        self._finished += self._current
        self._finished += self._running
        self._current.clear()
        self._running.clear()
        self._steps += 1
        if self._steps >= self.every:
            self.write()
        self._adjust()

    def write(self) -> None:
        """Hand on the rows of the steps since the last time, though fewer than `every`."""
        records, steps = self._finished, self._steps
        self._finished, self._steps = [], 0
        for row in rows_of(records, self._last, steps, self._names):
            for sink in self.sinks:
                sink(row)

    def close(self) -> None:
        """Write what is left of finished steps, end the recording, and close the sinks. May be called again."""
        try:
            self.pause()
            self.write()
        finally:
            for sink in self.sinks:
                if callable(close := getattr(sink, "close", None)):
                    close()
            self._current.clear()

    def __enter__(self) -> SolveLogger:  # noqa: PYI034, Self is of Python 3.11
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        self.close()
