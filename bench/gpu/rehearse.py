"""A stand-in for CUDA: graphs that call again what they recorded, and a log of every call. For dry runs and tests.

With Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported) the engines then run on the CPU, numbers and all: static
buffers, operands that are copied or read in place, conditions and flags are the real ones; only the capture is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deq_compile.kernels.device import rehearsal
from deq_compile.region.engine import captures
from deq_compile.region.engine.device import Device, Graph, Work

MOST_TRIPS = 1000  # a condition that nobody clears must not hang a test


class RehearsedGraph:
    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.work: Work = lambda: None

    def capture_begin(self, **options: Any) -> None:
        self.log.append("begin")

    def capture_end(self) -> None:
        self.log.append("end")

    def replay(self) -> None:
        self.log.append("replay")
        self.work()


class _Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Condition:
    def __init__(self) -> None:
        self.handle = torch.ones(1, dtype=torch.int64)


class _While:
    def __init__(self, log: list[str], condition: _Condition, before: Any, trip: Any, after: Any) -> None:
        self.log, self.condition, self.before, self.trip, self.after = log, condition, before, trip, after

    def replay(self) -> None:
        if self.before is not None:
            self.before.replay()
        self.condition.handle.fill_(1)
        trips = 0
        while int(self.condition.handle) and trips < MOST_TRIPS:
            self.trip.replay()
            trips += 1
        self.after.replay()
        self.log.append(f"trips {trips}")


class RehearsalDevice(Device):
    """A Device without a device. `log` is shared by all; `refuse` makes engines fail as a real device might."""

    log: list[str] = []  # noqa: RUF012
    refuse: dict[str, Exception] = {}  # noqa: RUF012
    captured_by_others = False
    reads_addresses = False  # it calls functions again, on the tensors they were recorded with

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None
        self.last = None

    @classmethod
    def capturing(cls) -> bool:
        return cls.captured_by_others

    @staticmethod
    def settings() -> tuple[Any, ...]:
        return ()

    def warm(self, work: Work) -> None:
        self.log.append("warm")
        super().warm(work)

    def capture(self, work: Work, *, keep: bool = False) -> Graph:
        if "capture" in self.refuse:
            raise self.refuse["capture"]
        graph = super().capture(work, keep=keep)
        assert isinstance(graph, RehearsedGraph)
        graph.work = work
        return graph

    def new_graph(self, keep: bool) -> Any:
        return RehearsedGraph(self.log)

    @classmethod
    def clear_workspaces(cls) -> None:
        cls.log.append("clear")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def new_condition(self) -> Any:
        if "while" in self.refuse:
            raise self.refuse["while"]
        return _Condition()

    def while_graph(self, parts: Any) -> Graph:
        return _While(self.log, **parts)

    def pinned(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32)

    def event(self) -> Any:
        return _Event()

    def enter_stream(self, after: Any) -> None: ...


@contextlib.contextmanager
def rehearsed() -> Iterator[type[RehearsalDevice]]:
    """Treat the CPU as a GPU, with stand-ins for streams, events and graphs; captured solves are forgotten before and after."""
    before = captures.device_class
    captures.clear()
    RehearsalDevice.log.clear()
    RehearsalDevice.refuse.clear()
    RehearsalDevice.captured_by_others = False
    captures.device_class = RehearsalDevice
    try:
        with rehearsal():
            yield RehearsalDevice
    finally:
        captures.device_class = before
        captures.clear()


