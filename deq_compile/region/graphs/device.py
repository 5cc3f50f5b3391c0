"""What the engines ask of CUDA, in one place: tests and dry runs put a stand-in here that logs the calls."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from deq_compile import torch_parts

log = logging.getLogger("deq_compile.region")
Work = Callable[[], None]
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()

# Graphs whose capture failed and never told the allocators: torch's host allocator goes on asking them which stream they record.
_never_ended: list[Any] = []


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
    """One CUDA device with a stream to capture on, one for all solves of a thread: one object a captured solve.

    reads_addresses  a graph reads what lies at an address; tensors that were there at the capture need not be kept
    """

    reads_addresses = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = _side(device)
        self.pool: Any = self.pool_handle()  # of the attempt to capture that is under way, or was the last
        self.last: Any = None  # the stream of the last launch
        self.one = torch.zeros(1, device=device)  # what a capture that heals works on

    @staticmethod
    def capturing() -> bool:
        """Whether the caller's stream is being captured already, by somebody else."""
        return torch.cuda.is_initialized() and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    @staticmethod
    def current(device: torch.device) -> AbstractContextManager[None]:
        """Inside, `device` is the current one, where Triton and the CUDA runtime launch; ATen looks at its tensors."""
        return torch.cuda.device(device) if device.type == "cuda" else _NOTHING

    @staticmethod
    def current_device(like: torch.device) -> torch.device:
        """The current device of the type of `like`."""
        return torch.device("cuda", torch.cuda.current_device()) if like.type == "cuda" else like

    @staticmethod
    def place(tensor: Tensor) -> torch.device:
        """Where a tensor lies. A graph reads memory of its own device; what lies elsewhere it has as a number of its capture."""
        return tensor.device

    @staticmethod
    def settings() -> tuple[Any, ...]:
        """Global settings that a captured graph has built in."""
        return torch_parts.cuda_settings()

    @staticmethod
    def memory(device: torch.device) -> int:
        """Bytes that the device has."""
        return torch.cuda.get_device_properties(device).total_memory

    def graph_bytes(self) -> int:
        """Bytes that the graphs of this object work in: the segments of their private pool, which nobody else uses."""
        return sum(segment["total_size"] for segment in torch_parts.pool_segments(self.pool))

    def warm(self, work: Work) -> None:
        """Run work on the capturing stream, in the capturing thread: handles, modules and autotuning are in place afterwards."""
        with self.aside():
            work()

    def new_pool(self) -> None:
        """Begin another attempt to capture. A pool whose graphs are all gone is dead to torch: to begin in it again raises."""
        self.pool = self.pool_handle()

    def capture(self, work: Work, *, keep: bool = False) -> Graph:
        """Record work as a graph. With `keep` it is not instantiated: it becomes a part of a larger graph.

        Raises whatever the recording raises; what was recorded up to then is thrown away, and torch is as it was before.
        """
        graph = self.new_graph(keep)
        with self.aside(), collector_paused():
            self.clear_workspaces()
            try:
                # Not torch.cuda.graph: that synchronises the device and empties caches.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                work()
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
            finally:
                self.clear_workspaces()
        return graph

    def _abandon(self, graph: Any) -> None:
        """Undo what a capture that failed left behind: the pool in use, and the flag of the random generator.

        torch before 2.13 has one flag for "the default generator is captured", and only a capture that succeeds clears it.
        """
        self._end(graph)
        self.new_pool()
        healing = self.new_graph(False)
        try:
            healing.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            self.one.zero_()
            healing.capture_end()
        except RuntimeError as error:
            self._end(healing)
            log.warning("random numbers may be refused from now on, since a failed capture could not be undone: %s", error)
        self.new_pool()  # the graph goes, and its pool with it

    def _end(self, graph: Any) -> None:
        """End a capture that may have been invalidated: then `capture_end` raises before it tells the allocators.

        The pool may be released here only then. Else the graph does that, and torch ends the process if it is once too often.
        """
        try:
            graph.capture_end()  # an error of Python's in the work: nothing was invalidated
        except RuntimeError:
            try:
                self.end_allocating(self.pool)
            except (RuntimeError, torch_parts.Unavailable):
                return  # it was not begun, or it was ended
            _never_ended.append(graph)
            self.release_pool(self.pool)

    @staticmethod
    def pool_handle() -> Any:
        return torch.cuda.graph_pool_handle()

    def end_allocating(self, pool: Any) -> None:
        torch_parts.end_allocate_to_pool(self.device.index, pool)

    def release_pool(self, pool: Any) -> None:
        torch_parts.release_pool(self.device.index, pool)

    @staticmethod
    def clear_workspaces() -> None:
        """cuBLAS keeps a workspace a stream: one made during a capture lies in the graph's memory, and others must not use it."""
        torch_parts.clear_workspaces()

    def new_graph(self, keep: bool) -> Any:
        return torch.cuda.CUDAGraph(keep_graph=True) if keep else torch.cuda.CUDAGraph()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside: the capturing stream, after all that the caller's has been given; outside again, the reverse."""
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cast that is cached outside would be missing inside, and the reverse
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self.side):
                yield
        finally:
            torch.set_autocast_cache_enabled(cache)
            current.wait_stream(self.side)  # after an error too: what was enqueued may still read the caller's tensors

    def while_graph(self, parts: Any) -> Graph:
        """One graph with a WHILE node; see `conditional.WhileGraph`."""
        from .conditional import WhileGraph

        with self.current(self.device):
            return WhileGraph(self, **parts)

    def new_condition(self) -> Any:
        """An empty graph and the handle of the condition that its WHILE node will have."""
        from .conditional import Condition

        with self.current(self.device):
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


_of_thread = threading.local()


def _side(device: torch.device) -> Any:
    """The capturing stream of this thread. With one each, every solve would leave what warming up took behind, in the caching
    allocator's blocks of its stream."""
    sides: dict[torch.device, Any] = _of_thread.__dict__.setdefault("sides", {})
    if device not in sides:
        sides[device] = torch.cuda.Stream(device)
    return sides[device]


class _Pauses:
    """Threads that record now, and whether the collector was on before the first of them began."""

    lock, count, enabled = threading.Lock(), 0, False


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """The collector may drop a graph or a tensor of somebody else's in the middle of a recording."""
    with _Pauses.lock:
        if _Pauses.count == 0:
            _Pauses.enabled = gc.isenabled()
            gc.disable()
        _Pauses.count += 1
    try:
        yield
    finally:
        with _Pauses.lock:
            _Pauses.count -= 1
            if _Pauses.count == 0 and _Pauses.enabled:
                gc.enable()
