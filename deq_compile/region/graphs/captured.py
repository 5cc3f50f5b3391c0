"""One captured solve: its program, its operands, its engine, and who may use it when."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from deq_compile.kernels.broyden.gpu import SUMMARY

from .borrowed import Borrowed
from .device import Device
from .engines import Engine, Program, capture, told
from .operands import Operands


class Captured:
    """A program, the operands of its body, and the engine it was captured for. Serves one caller at a time.

    linear    of an adjoint: the body linearised, whose products the program takes
    launched  an event behind the last solve; None before the first
    """

    linear: Any = None

    def __init__(self, device: Device, operands: Operands) -> None:
        self.device, self.operands = device, operands
        self.busy = threading.Lock()
        self.launched: Any = None
        self.engine: Engine | None = None
        self.reason = ""
        self.borrowed: Borrowed | None = None

    @property
    def name(self) -> str:
        return "loop" if self.engine is None else self.engine.name

    @property
    def hopeless(self) -> bool:
        """Whether to capture anew: operands that are read in place have moved too often."""
        return self.operands.hopeless

    def solve(self, *args: Any, **options: Any) -> Any:
        """What a captured solve is for; None where it cannot serve now."""
        return None

    def build(self, program: Program, once: Callable[[], None], cap: int, wanted: str) -> None:
        """Warm up in this thread, on the capturing stream, then capture."""
        summary = self.device.pinned(SUMMARY)

        def warm() -> None:
            once()
            program.state.summarise(summary)

        self.device.enter_stream(None)
        self.device.warm(warm)
        self.engine, self.reason = capture(self.device, program, cap, wanted)
        self._mark()  # whoever comes on another stream waits for the warming up as for a solve
        if self.device.reads_addresses and self.engine is not None:
            self.let_go()

    def let_go(self) -> None:
        """Keep nothing alive of the operands that are read in place, nor of what the linearised body saved of them: they could
        never again lie where the graphs read them."""
        if self.linear is not None:
            self.borrowed = Borrowed(self.linear, self.operands)
            self.linear = self.borrowed.without()
        self.operands.release()

    def enter(self, operands: Sequence[Tensor]) -> bool:
        """Take it for one solve, with these operands; False where it cannot serve: in use, or an operand has moved."""
        if self.engine is None or not self.busy.acquire(blocking=False):
            return False
        served = False
        try:
            self.device.enter_stream(self.launched)
            served = self.operands.load(operands)
            if served and self.borrowed is not None:
                self.linear = self.borrowed.of(operands)
        except BaseException:
            served = False
            raise
        finally:
            if not served:
                self.busy.release()
        return served

    def launch(self) -> bool:
        """Enqueue a solve that was entered. False where CUDA refuses, for want of memory for instance: the loop serves from now
        on, and says what is wrong if it is not the graph."""
        assert self.engine is not None
        try:
            self.engine.launch()
        except RuntimeError as error:
            self.engine, self.reason = None, told(error)
            return False
        return True

    def _mark(self) -> None:
        """Note on the caller's stream that all of a solve has been enqueued."""
        self.launched = self.launched or self.device.event()
        self.launched.record()

    def leave(self) -> None:
        try:
            self._mark()
        finally:
            if self.borrowed is not None:
                self.linear = self.borrowed.without()
            self.busy.release()

    def finished(self) -> bool:
        """Whether the last launch has ended, so that the buffers may go."""
        return not self.busy.locked() and (self.launched is None or self.launched.query())

    def wait(self) -> None:
        """Wait for the last launch to end, so that the buffers may go."""
        if self.launched is not None:
            self.launched.synchronize()

    def on(self, device: torch.device) -> bool:
        return self.device.device == device

    def bytes(self) -> int:
        """Device memory that goes when this does, in bytes: the storages of its states and of the operands it copies, each once
        and whole, and the segments of the pool that its graphs work in, where what a linearised body saves lies too. Operands
        that are read in place are somebody else's. Factors of solves that leave none count from the first solve on."""
        return _bytes_of((vars(self).values(), self.operands.targets)) + self.device.graph_bytes()


class Declined(Captured):
    """Nothing was captured, and nothing will be for such calls; `reason` says why. The loop serves."""

    def __init__(self, reason: str) -> None:
        self.busy, self.launched, self.engine, self.reason, self.borrowed = threading.Lock(), None, None, reason, None

    @property
    def hopeless(self) -> bool:
        return False

    def on(self, device: torch.device) -> bool:
        return False


def _bytes_of(held: Iterable[Any]) -> int:
    """Bytes of the storages under tensors in collections and dataclasses."""
    found: dict[int, int] = {}
    todo = list(held)
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, (list, tuple, type({}.values()))):
            todo.extend(item)
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            todo.extend(vars(item).values())
    return sum(found.values())
