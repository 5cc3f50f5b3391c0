"""What the parts share: the setting, rows that are written as they come, and clocks."""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
FLUSH_BYTES = 256 << 20  # several times any L2; while it is cleared the host gets ahead of the device


@dataclass
class Setting:
    """Where a part runs, how long it may, and the file its rows go to.

    dry  no device: tiny shapes in Triton's interpreter; times mean nothing
    """

    part: str
    file: Path
    dry: bool
    seconds: float
    begun: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)

    def row(self, what: str, **values: Any) -> None:
        """Append a row at once: what is there survives whatever comes next."""
        row = {"part": self.part, "what": what, **values}
        line = json.dumps(row, default=str)
        with self.file.open("a") as file:
            file.write(line + "\n")
        print(line[:300], flush=True)

    @contextmanager
    def guarded(self, what: str, **values: Any) -> Iterator[None]:
        """A failure becomes a row, and the next measurement is taken. A broken device context ends the part."""
        try:
            yield
        except Exception as error:
            self.row(what, **values, error=f"{type(error).__name__}: {error}"[:600], trace=traceback.format_exc()[-1500:])
            if "illegal" in str(error) or "unspecified launch failure" in str(error):
                raise

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def device_us(self, work: Callable[[], None], reset: Callable[[], None] | None = None, repeats: int = 9) -> float:
        """Median time on the device of what `work` enqueues, in µs, caches cleared before; `reset` is not timed."""
        if self.dry:
            return self.wall_us(work, reset, repeats=1)
        flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=self.device)
        pairs = []
        for turn in range(repeats + 2):
            if reset is not None:
                reset()
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            if turn >= 2:
                pairs.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs) * 1e3

    def wall_us(self, work: Callable[[], None], reset: Callable[[], None] | None = None, repeats: int = 9) -> float:
        """Median time until the device has done what `work` asks for, in µs."""
        found = []
        for turn in range(repeats + (0 if self.dry else 2)):
            if reset is not None:
                reset()
            self.sync()
            begin = time.perf_counter()
            work()
            self.sync()
            if self.dry or turn >= 2:
                found.append(1e6 * (time.perf_counter() - begin))
        return statistics.median(found)

    def host_us(self, work: Callable[[], None], calls: int = 20, repeats: int = 5) -> float:
        """Median time the host spends in one call, in µs; it does not wait for the device within a series."""
        found = []
        for _ in range(1 if self.dry else repeats):
            self.sync()
            begin = time.perf_counter()
            for _ in range(1 if self.dry else calls):
                work()
            found.append(1e6 * (time.perf_counter() - begin) / (1 if self.dry else calls))
        self.sync()
        return statistics.median(found)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in float64; NaN where anything is NaN."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
