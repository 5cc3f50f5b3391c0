"""A stand-in for CUDA: graphs that call again what they recorded, and a log of every call. For dry runs and tests.

With Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported) the engines then run on the CPU, numbers and all: static
buffers, operands that are copied or read in place, conditions and flags are the real ones; only the capture is not. Captures obey
torch's rules about memory pools and the random generator (`rules.py`), so what would leave torch broken on a device fails here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deq_compile.testing import Device, Graph, Work, captures, rehearsal, set_from_flag

from .rules import Fault, RehearsedGraph, Rules, fresh

MOST_TRIPS = 1000  # a condition that nobody clears must not hang a test


class _Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Condition:
    def __init__(self) -> None:
        self.handle = torch.ones(1, dtype=torch.int64)
        self.flag = torch.zeros(1, dtype=torch.int32)


class _While:
    def __init__(self, log: list[str], condition: _Condition, before: Any, trip: Any, after: Any, flagged: bool = False) -> None:
        self.log, self.condition, self.flagged = log, condition, flagged
        self.before, self.trip, self.after = before, trip, after

    def replay(self) -> None:
        if self.before is not None:
            self.before.replay()
        self.condition.handle.fill_(1)
        trips = 0
        while int(self.condition.handle) and trips < MOST_TRIPS:
            self.trip.replay()
            trips += 1
            if self.flagged:
                set_from_flag(self.condition)
                self.log.append("decide")
        self.after.replay()
        self.log.append(f"trips {trips}")


class RehearsalDevice(Device):
    """A Device without a device. What is shared by all is on the class:

    log      of every call
    refuse   makes what is named there raise as a device might: "capture", "while" (no condition), "while_graph" (no assembly)
    faults   captures that go wrong, by their number since `rehearsed` began
    rules    what torch would know of the captures
    inside   how many `current` are open: launches belong into one
    on_host  tensors that are to be taken for the host's own
    """

    log: list[str] = []  # noqa: RUF012
    refuse: dict[str, BaseException] = {}  # noqa: RUF012
    faults: dict[int, Fault] = {}  # noqa: RUF012
    rules = Rules()
    captures = 0
    inside = 0
    on_host: Callable[[Tensor], bool] = staticmethod(lambda tensor: False)
    captured_by_others = False
    reads_addresses = False  # it calls functions again, on the tensors they were recorded with

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = self.pool_handle()
        self.last = None
        self.one = torch.zeros(1)

    @classmethod
    def reset(cls) -> None:
        cls.log.clear()
        cls.refuse.clear()
        cls.faults.clear()
        cls.rules, cls.captures, cls.captured_by_others = Rules(), 0, False
        cls.on_host = staticmethod(lambda tensor: False)

    @classmethod
    @contextlib.contextmanager
    def current(cls, device: torch.device) -> Iterator[None]:
        RehearsalDevice.inside += 1
        try:
            yield
        finally:
            RehearsalDevice.inside -= 1

    @classmethod
    def capturing(cls) -> bool:
        return cls.captured_by_others

    @classmethod
    def place(cls, tensor: Tensor) -> torch.device:
        return torch.device("meta") if cls.on_host(tensor) else tensor.device

    @staticmethod
    def memory(device: torch.device) -> int:
        return 1 << 40

    def graph_bytes(self) -> int:
        return 0

    @classmethod
    def pool_handle(cls) -> Any:
        return cls.rules.handle()

    def end_allocating(self, pool: Any) -> None:
        self.rules.end_allocating(pool)

    def release_pool(self, pool: Any) -> None:
        self.rules.release(pool)

    def warm(self, work: Work) -> None:
        self.log.append("warm")
        super().warm(work)

    def capture(self, work: Work, *, keep: bool = False) -> Graph:
        if "capture" in self.refuse:
            raise fresh(self.refuse["capture"])
        self.rules.planned = self.faults.get(RehearsalDevice.captures)
        RehearsalDevice.captures += 1

        def recorded() -> None:
            work()
            assert self.rules.recording is not None
            self.rules.recording.worked()

        graph = super().capture(recorded, keep=keep)
        assert isinstance(graph, RehearsedGraph)
        graph.work = work
        return graph

    def new_graph(self, keep: bool) -> Any:
        return RehearsedGraph(self.log, self.rules)

    @classmethod
    def clear_workspaces(cls) -> None:
        cls.log.append("clear")

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        with self.current(self.device):
            yield

    def new_condition(self) -> Any:
        if "while" in self.refuse:
            raise fresh(self.refuse["while"])
        return _Condition()

    def while_graph(self, parts: Any) -> Graph:
        if "while_graph" in self.refuse:
            raise fresh(self.refuse["while_graph"])
        return _While(self.log, **parts)

    def pinned(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32)

    def event(self) -> Any:
        return _Event()

    def enter_stream(self, after: Any) -> None: ...


@contextlib.contextmanager
def rehearsed() -> Iterator[type[RehearsalDevice]]:
    """Treat the CPU as a GPU, with stand-ins for streams, events and graphs; captured solves are forgotten before and after.

    Raises:
        RuntimeError: at the end, captures that failed have left torch broken.
    """
    before = captures.device_class
    captures.clear()
    RehearsalDevice.reset()
    captures.device_class = RehearsalDevice
    try:
        with rehearsal():
            yield RehearsalDevice
    finally:
        captures.device_class = before
        captures.clear()
    RehearsalDevice.rules.check()
