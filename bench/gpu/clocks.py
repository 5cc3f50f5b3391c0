"""Clocks: time on the device with the host out of the way, time on the host, and time until all is done."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLUSH_BYTES = 1 << 30  # far more than any L2; clearing it takes an H100 about 0.4 ms
COVER = 2.0  # how many times the host's time the flush has to last
MOST_FLUSHES = 40
WARM_UP = 3

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Medians, in µs.

    device   between two events around the work on the stream, caches cleared before
    host     until the call returned
    covered  whether the host had enqueued all of it before the device began: else `device` holds waiting for the host
    """

    device: float
    host: float
    covered: bool

    def rounded(self) -> dict[str, float | bool]:
        return {"us": round(self.device, 2), "us_host": round(self.host, 1), "host_hidden": self.covered}


class Clocks:
    """What a setting measures with. dry: no device; times are then those of the interpreter, and mean nothing."""

    dry: bool
    device: torch.device
    _flush: tuple[Tensor, float] | None = None

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def flush(self) -> tuple[Tensor, float]:
        """A tensor whose clearing empties the caches, and how long that takes on this device, in µs."""
        if self._flush is None:
            tensor = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=self.device)
            pairs = []
            for _ in range(4):
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                tensor.zero_()
                pair[1].record()
                pairs.append(pair)
            torch.cuda.synchronize()
            self._flush = tensor, 1e3 * statistics.median(a.elapsed_time(b) for a, b in pairs[1:])
        return self._flush

    def timed(self, work: Work, reset: Work | None = None, repeats: int = 9) -> Timing:
        """Time what `work` enqueues, after `reset`, which is not timed.

        The device is kept busy clearing memory while the host enqueues the work: as often as the host's own time, measured
        first, asks for. What waits for the device inside can never be covered, and says so.
        """
        host = self._host(work, reset)
        if self.dry:
            return Timing(host, host, True)
        tensor, once = self.flush()
        flushes = min(max(math.ceil(COVER * host / once), 1), MOST_FLUSHES)
        found, covered = [], True
        for _ in range(repeats):
            if reset is not None:
                reset()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            for _ in range(flushes):
                tensor.zero_()
            begin.record()
            work()
            covered &= not begin.query()
            end.record()
            torch.cuda.synchronize()
            found.append(1e3 * begin.elapsed_time(end))
        return Timing(statistics.median(found), host, covered)

    def _host(self, work: Work, reset: Work | None) -> float:
        found = []
        for _ in range(1 if self.dry else WARM_UP):
            if reset is not None:
                reset()
            self.sync()
            begin = time.perf_counter()
            work()
            found.append(1e6 * (time.perf_counter() - begin))
        return min(found[1:], default=found[0])

    def device_us(self, work: Work, reset: Work | None = None, repeats: int = 9) -> float:
        """Median time on the device of what `work` enqueues, in µs; see `timed`."""
        return self.timed(work, reset, repeats).device

    def wall_us(self, work: Work, reset: Work | None = None, repeats: int = 9) -> float:
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

    def host_us(self, work: Work, calls: int = 20, repeats: int = 5) -> float:
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
