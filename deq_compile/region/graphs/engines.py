"""The engines that run a captured loop. What they run is a `Program`; what they run it on is a `Device`."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Protocol

from deq_compile.kernels.broyden.gpu import SUMMARY, TritonState
from deq_compile.kernels.gcr.gpu import TritonGcr

from .device import Device, Graph, Refused

# Who sets the condition of the WHILE node. "child": the kernels of an iteration, which are a child graph of the loop's body.
# "flag": one node of the body's own, from a flag in device memory that those kernels write; one launch more an iteration, for
# drivers that take the condition from the body itself only.
STRUCTURE = "child"
# Iterations of one graph of `chunks`. After the loop has ended, what is left of a chunk costs its bodies for nothing.
CHUNK = 4


class Program(Protocol):
    """A loop whose every decision is taken on the device, on buffers of its own.

    state   of the iteration; its launches end the loop
    before  what precedes the loop; None where nothing does
    trip    one iteration: enqueued, never waiting
    """

    @property
    def state(self) -> TritonState | TritonGcr: ...

    @property
    def before(self) -> Callable[[], None] | None: ...

    def trip(self) -> None: ...


class Engine(abc.ABC):
    """A program, captured. `launch` enqueues all of it, or as much as is needed to see its end; `outcome` waits for that."""

    name: str
    note = ""  # what is particular about the way it runs

    def __init__(self, device: Device) -> None:
        # What `summarise` writes: running, missed, most evaluations of this launch; missed in all.
        self.summary, self.event = device.pinned(SUMMARY), device.event()
        self.known = 0  # of what was missed in all

    @abc.abstractmethod
    def launch(self) -> None: ...

    def ready(self) -> bool:
        """Whether the last launch has ended; never waits."""
        return self.event.query()

    def outcome(self) -> tuple[int, int]:
        """Samples that missed their tolerance, and the most evaluations of any. Waits for the launch to end."""
        self.event.synchronize()
        _, missed, most, _ = self.summary.tolist()
        return missed, most

    def missed_since(self) -> bool:
        """Whether a sample of any launch has missed its tolerance since this was last asked. Waits for the last launch."""
        self.event.synchronize()
        before, self.known = self.known, int(self.summary[3])
        return self.known != before


class While(Engine):
    """The whole loop is one graph; the host takes no part in it."""

    name = "while"

    def __init__(self, device: Device, program: Program, structure: str = "child") -> None:
        super().__init__(device)
        flagged = structure == "flag"
        if flagged:
            self.note = "while: a node of the loop's own sets the condition, from a flag"
        condition = device.new_condition()
        state = program.state
        state.handle = condition.flag if flagged else condition.handle
        try:
            # A kernel that sets the condition may run in that graph only: it is loaded, not run.
            with state.loading():
                program.trip()
            before = device.capture(program.before, keep=True) if program.before is not None else None
            trip = device.capture(program.trip, keep=True)
            after = device.capture(lambda: state.summarise(self.summary), keep=True)
            parts = {"condition": condition, "before": before, "trip": trip, "after": after, "flagged": flagged}
            self.graph: Graph = device.while_graph(parts)
        except BaseException:
            state.handle = None
            raise

    def launch(self) -> None:
        self.graph.replay()
        self.event.record()


class Chunks(Engine):
    """Iterations in graphs of `CHUNK`; as many as the last solve took are enqueued before the host looks for the first time."""

    name = "chunks"

    def __init__(self, device: Device, program: Program, cap: int) -> None:
        super().__init__(device)
        self.cap = math.ceil(cap / CHUNK)
        self.expected = 1
        state = program.state

        def chunk() -> None:
            for _ in range(CHUNK):
                program.trip()
            state.summarise(self.summary)

        with state.loading():
            program.trip()
        self.before = device.capture(program.before) if program.before is not None else None
        self.graph = device.capture(chunk)

    def launch(self) -> None:
        if self.before is not None:
            self.before.replay()
        done = 0
        while done < self.cap:
            for _ in range(max(min(self.expected, self.cap) - done, 1)):
                self.graph.replay()
                done += 1
            self.event.record()
            self.event.synchronize()
            if int(self.summary[0]) == 0:
                break
        self.expected = max(math.ceil(int(self.summary[2]) / CHUNK), 1)


def capture(device: Device, program: Program, cap: int, wanted: str) -> tuple[Engine | None, str]:
    """The best engine that can run a program, and in words why the better ones cannot, or what is particular about this one.

    Args:
        device: where to capture.
        program: warmed up already.
        cap: most iterations the program can take.
        wanted: "auto", or the name of the best engine to try.
    """
    builders: dict[str, Callable[[], Engine]] = {
        "while": lambda: While(device, program, STRUCTURE),
        "chunks": lambda: Chunks(device, program, cap),
    }
    names = list(builders)
    reasons: list[str] = []
    for name in names if wanted == "auto" else names[names.index(wanted) :]:
        engine, reason = _attempt(device, builders[name])
        if engine is not None:
            return engine, "; ".join([*reasons, *([engine.note] if engine.note else [])])
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)


def _attempt(device: Device, build: Callable[[], Engine]) -> tuple[Engine | None, str]:
    device.new_pool()  # what an earlier attempt recorded is gone, and its pool with it
    try:
        return build(), ""
    except Exception as error:  # whatever a body may do that a capture does not allow
        return None, told(error)


def told(error: Exception) -> str:
    """An error in one line."""
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
