"""Where rows go. A sink is called with each row, a dict; one that has a `close` is closed when the logger ends."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from .optional import need
from .rows import COLUMNS, WORDS

Sink: TypeAlias = Callable[[dict[str, Any]], object]


def numbers(row: dict[str, Any], prefix: str) -> dict[str, float]:
    """What boards can draw: the numbers of a row by ``prefix/region/name``, those that there are."""
    found = {name: value for name, value in row.items() if name not in ("step", *WORDS) and value is not None}
    return {f"{prefix}/{row['region']}/{name}": float(value) for name, value in found.items()}


class CSVSink:
    """Append rows to a file; each is on its way to the disk before the next step begins.

    A file that is there already is gone on with, so that a training that was interrupted loses nothing, a half-written last
    line apart. None is an empty cell.

    Args:
        path: the file; its folder is made.
        replace: begin the file anew.

    Raises:
        ValueError: the file holds something else than rows of this version.
    """

    def __init__(self, path: str | os.PathLike[str], replace: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = b"" if replace or not self.path.exists() else self.path.read_bytes()
        head = ",".join(COLUMNS)
        if before and before.splitlines()[0].decode(errors="replace") != head:
            raise ValueError(
                f"CSVSink: expected {self.path} to be new or to begin with {head!r}, got a file that does not. "
                "Fix: another path, or CSVSink(path, replace=True)"
            )
        self._file = self.path.open("w" if replace else "a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if not before:
            self._writer.writeheader()
        elif not before.endswith(b"\n"):
            self._file.write("\n")
        self._file.flush()

    def __call__(self, row: dict[str, Any]) -> None:
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars `deq/REGION/NAME` for TensorBoard.

    Args:
        writer: a `SummaryWriter`, which stays open, or the folder of one that is made.
        prefix: of the scalars' names.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, writer: Any = "runs", prefix: str = "deq") -> None:
        self._own = isinstance(writer, str | os.PathLike)
        if self._own:
            writer = need("torch.utils.tensorboard", "TensorBoardSink", "tensorboard").SummaryWriter(os.fspath(writer))
        self.writer, self.prefix = writer, prefix

    def __call__(self, row: dict[str, Any]) -> None:
        for name, value in numbers(row, self.prefix).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        if self._own:
            self.writer.close()


class WandbSink:
    """Numbers `deq/REGION/NAME` for Weights & Biases, drawn against `deq/step`, so that the run's own step is left alone.

    Args:
        run: a run; None for the one that `wandb.init` has begun.
        prefix: of the numbers' names.

    Raises:
        ImportError: wandb is not installed, and no run is given.
        ValueError: no run is given, and none has begun.
    """

    def __init__(self, run: Any = None, prefix: str = "deq") -> None:
        if run is None:
            run = need("wandb", "WandbSink", "wandb").run
        if run is None:
            raise ValueError("WandbSink: expected a run, got none. Fix: wandb.init(...) before, or WandbSink(run)")
        self.run, self.prefix = run, prefix
        run.define_metric(f"{prefix}/step")
        run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")

    def __call__(self, row: dict[str, Any]) -> None:
        self.run.log({f"{self.prefix}/step": row["step"], **numbers(row, self.prefix)})


def sink_of(target: Any) -> Sink:
    """A callable as it is; a path as a CSV file.

    Raises:
        TypeError: neither of the two.
    """
    if isinstance(target, str | os.PathLike):
        return CSVSink(target)
    if callable(target) and not isinstance(target, type):
        found: Sink = target
        return found
    raise TypeError(
        f"SolveLogger: expected sinks to be paths of CSV files or callables that take a row, got {target!r}. "
        "Fix: SolveLogger('solves.csv'), SolveLogger(TensorBoardSink('runs')), rows = []; SolveLogger(rows.append)"
    )
