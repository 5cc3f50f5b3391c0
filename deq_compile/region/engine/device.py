"""What the engines ask of CUDA, in one place: tests and dry runs put a stand-in here that logs the calls."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], None]


class Refused(Exception):
    """An engine cannot serve this solve; the message says why. The next one down does."""


class Graph(Protocol):
    """A captured piece of work."""

    def replay(self) -> None: ...


class Event(Protocol):
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool: ...


class Device:
    """One CUDA device with a stream of its own to capture on: one object a captured solve.

    reads_addresses  a graph reads what lies at an address; tensors that were there at the capture need not be kept
    """

    reads_addresses = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.last: Any = None  # the stream of the last launch

    @staticmethod
    def capturing() -> bool:
        """Whether the caller's stream is being captured already, by somebody else."""
        return torch.cuda.is_initialized() and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    @staticmethod
    def settings() -> tuple[Any, ...]:
        """Global settings that a captured graph has built in."""
        return (
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
        )

    def warm(self, work: Work) -> None:
        """Run work on the capturing stream, in the capturing thread: handles, modules and autotuning are in place afterwards."""
        with self.aside():
            work()

    def capture(self, work: Work, *, keep: bool = False) -> Graph:
        """Record work as a graph. With `keep` it is not instantiated: it becomes a part of a larger graph.

        Raises whatever the recording raises; what was recorded up to then is thrown away.
        """
        graph = self.new_graph(keep)
        with self.aside(), _collector_paused():
            self.clear_workspaces()
            # Not torch.cuda.graph: that synchronises the device and empties caches.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            else:
                graph.capture_end()
            finally:
                self.clear_workspaces()
        return graph

    @staticmethod
    def clear_workspaces() -> None:
        """cuBLAS keeps a workspace a stream: one made during a capture lies in the graph's memory, and others must not use it."""
        torch._C._cuda_clearCublasWorkspaces()

    def new_graph(self, keep: bool) -> Any:
        return torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside: this object's own stream, after all that the caller's has been given; outside again, the reverse."""
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cast that is cached outside would be missing inside, and the reverse
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self.side):
                yield
        finally:
            torch.set_autocast_cache_enabled(cache)
        current.wait_stream(self.side)

    def while_graph(self, parts: Any) -> Graph:
        """One graph with a WHILE node; see `conditional.WhileGraph`."""
        from .conditional import WhileGraph

        return WhileGraph(self, **parts)

    def new_condition(self) -> Any:
        """An empty graph and the handle of the condition that its WHILE node will have."""
        from .conditional import Condition

        return Condition(self.device)

    def pinned(self, count: int) -> Tensor:
        """Host memory that a graph may copy to, int32."""
        return torch.zeros(count, dtype=torch.int32, pin_memory=True)

    def event(self) -> Event:
        return torch.cuda.Event()

    def enter_stream(self, after: Any) -> None:
        """Let the caller's stream wait for the last launch if that went to another one."""
        current = torch.cuda.current_stream(self.device)
        if after is not None and self.last is not None and current != self.last:
            current.wait_event(after)
        self.last = current


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """The collector may drop a graph or a tensor of somebody else's in the middle of a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
