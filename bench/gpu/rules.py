"""torch's rules for captures of CUDA graphs, those of torch 2.11: memory pools, recordings, the flag of the random generator.

Sources: CUDAGraph.cpp (`capture_begin`, `capture_end`, `reset`), CUDACachingAllocator.cpp (`beginAllocateToPool`, `releasePool`),
CachingHostAllocator.h and CUDAGeneratorImpl.h. What ends a process there (an error in a destructor) is kept in `fatal`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

Work = Callable[[], None]
STAGES = ("begin", "work", "invalidated", "instantiate")


class Fault:
    """One capture that goes wrong, and where.

    begin        the stream refuses to be recorded; the generator and the allocators know of the capture already
    work         Python raises at the end of the work; the recording is as good as before
    invalidated  the work does what no recording allows: it raises, and the recording cannot be ended properly
    instantiate  all is recorded and the allocators have been told; making it executable fails
    """

    def __init__(self, stage: str, error: BaseException | None = None) -> None:
        if stage not in STAGES:
            raise ValueError(f"expected a stage of {', '.join(STAGES)}, got {stage!r}")
        self.stage, self.error = stage, error or RuntimeError(f"CUDA error: refused in {stage}")

    def fresh(self) -> BaseException:
        return fresh(self.error)


def fresh(error: BaseException) -> BaseException:
    """An error like this one. One that was raised keeps alive, in its traceback, what a device would have let go: graphs."""
    return type(error)(*error.args)


class Rules:
    """What torch knows of all captures in a process. No handle comes twice, whatever the process."""

    def __init__(self) -> None:
        self.users: dict[int, int] = {}  # pools that ever were: the allocator of pinned memory never forgets one
        self.underway: list[int] = []
        self.generator_captured = False
        self.recording: RehearsedGraph | None = None
        self.planned: Fault | None = None  # of the next capture to begin
        self.fatal = ""

    _handles = itertools.count(1)

    def handle(self) -> int:
        return next(self._handles)

    def end_allocating(self, pool: int) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, pool: int) -> None:
        self.users[pool] -= 1
        if self.users[pool] < 0:
            self.fatal = "uc >= 0 INTERNAL ASSERT FAILED: a pool was released once too often"
            raise RuntimeError(self.fatal)

    def random(self) -> None:
        """What any random operation asks outside of a capture.

        Raises:
            RuntimeError: the generator takes itself for captured.
        """
        if self.generator_captured and self.recording is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def check(self) -> None:
        """That nothing is left of captures that failed.

        Raises:
            RuntimeError: a random operation would raise, a recording or a pool was left open, or the process would have ended.
        """
        self.random()
        if self.fatal or self.underway or self.recording is not None:
            raise RuntimeError(f"left behind: {self.fatal or 'nothing fatal'}; pools {self.underway}; {self.recording}")


class RehearsedGraph:
    """A CUDAGraph that calls again what it recorded, under the rules."""

    def __init__(self, log: list[str], rules: Rules) -> None:
        self.log, self.rules = log, rules
        self.work: Work = lambda: None
        self.fault: Fault | None = None
        self.pool = 0
        self.invalid = self.ended = False

    def capture_begin(self, pool: int, **options: Any) -> None:
        self.log.append("begin")
        rules = self.rules
        self.fault, rules.planned, self.pool = rules.planned, None, pool
        rules.generator_captured = True
        if rules.users.get(pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED, please report a bug to PyTorch")
        rules.users[pool] = rules.users.get(pool, 0) + 1
        if pool in rules.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        rules.underway.append(pool)
        if rules.recording is not None:
            raise RuntimeError("CUDA error: the stream is being captured already")
        if self.fault is not None and self.fault.stage == "begin":
            raise self.fault.fresh()
        rules.recording = self

    def worked(self) -> None:
        """At the end of the work, inside the recording."""
        if self.fault is not None and self.fault.stage in ("work", "invalidated"):
            self.invalid = self.fault.stage == "invalidated"
            raise self.fault.fresh()

    def capture_end(self) -> None:
        self.log.append("end")
        if self.rules.recording is not self:
            raise RuntimeError("CUDA error: the stream is not being captured")
        self.rules.recording = None
        if self.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.rules.end_allocating(self.pool)
        self.rules.generator_captured = False
        self.ended = True
        if self.fault is not None and self.fault.stage == "instantiate":
            raise self.fault.fresh()

    def replay(self) -> None:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self.log.append("replay")
        self.work()

    def __del__(self) -> None:
        if self.ended:
            self.rules.release(self.pool)
