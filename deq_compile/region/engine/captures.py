"""What captured solves share, and where they are held: one for each region, direction, set of shapes, settings and thread."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from deq_compile.kernels import device as kernel_device
from deq_compile.kernels.broyden.gpu import SUMMARY
from deq_compile.region.site import Site

from .device import Device
from .engines import Engine, Program, capture
from .operands import Operands, addresses

log = logging.getLogger("deq_compile.region")

# Captured solves that are held at a time. Each holds a few states and its small operands.
MOST = 32


class Captured:
    """A program, the operands of its body, and the engine it was captured for. Serves one caller at a time."""

    def __init__(self, device: Device, operands: Operands) -> None:
        self.device, self.operands = device, operands
        self.busy = threading.Lock()
        self.launched: Any = None
        self.engine: Engine | None = None
        self.reason = ""

    @property
    def name(self) -> str:
        return "loop" if self.engine is None else self.engine.name

    def build(self, program: Program, once: Callable[[], None], cap: int, wanted: str) -> None:
        """Warm up in this thread, on the capturing stream, then capture."""
        summary = self.device.pinned(SUMMARY)

        def warm() -> None:
            once()
            program.state.summarise(summary)

        self.device.warm(warm)
        self.engine, self.reason = capture(self.device, program, cap, wanted)
        if self.device.reads_addresses:
            self.operands.release()

    def enter(self, operands: Sequence[Tensor]) -> bool:
        """Take it for one solve, with these operands; False where it cannot serve: in use, or an operand has moved."""
        if self.engine is None or not self.busy.acquire(blocking=False):
            return False
        self.device.enter_stream(self.launched)
        if self.operands.load(operands):
            return True
        self.busy.release()
        return False

    def leave(self) -> None:
        self.launched = self.launched or self.device.event()
        self.launched.record()
        self.busy.release()

    def finished(self) -> bool:
        """Whether the last launch has ended, so that the buffers may go."""
        return not self.busy.locked() and (self.launched is None or self.launched.query())


class _Seen:
    """A key that has run in the loop once: where its operands lay, and which of them have to be copied."""

    def __init__(self, at: list[int], copy: frozenset[int] = frozenset()) -> None:
        self.addresses, self.copy = at, copy


T = TypeVar("T", bound=Captured)
_found: OrderedDict[Any, Captured | _Seen] = OrderedDict()
_orphans: deque[str] = deque()  # keys of regions that are gone, whose captured solves may go
_lock = threading.Lock()
device_class: type[Device] = Device


def find(
    key: tuple[Any, ...], state: Tensor, operands: Sequence[Tensor], wanted: str, build: Callable[[Device, Operands], T]
) -> T | None:
    """The captured solve for a key; None where there is none (yet): the loop serves.

    Args:
        key: the region, the direction, and all that is particular about this call beside shapes and thread.
        state: (B, D), a state of this call.
        operands: of this call.
        wanted: "auto", "while", "chunks", or "loop".
        build: makes and captures it.
    """
    if wanted == "loop" or not kernel_device.on_gpu(state.device) or not state.numel():
        return None
    full = (
        *key, state.shape, state.dtype, state.device, wanted, threading.get_ident(), device_class.settings(),
        tuple((o.shape, o.stride(), o.dtype) for o in operands),
    )  # fmt: skip
    with _lock:
        if _orphans:
            _sweep()
        entry = _found.get(full)
        if entry is None:
            _make_room()
            _found[full] = _Seen(addresses(operands))
            return None
        _found.move_to_end(full)
    if isinstance(entry, Captured):
        if not entry.operands.hopeless:
            return entry  # type: ignore[return-value]  # a key has one kind of solve
        entry = _Seen(addresses(operands), frozenset(entry.operands.moved))
    built = build(device_class(state.device), Operands(operands, entry.addresses, entry.copy))
    if built.reason:
        log.info("region %s: %s", key[0], built.reason)
    with _lock:
        _found[full] = built
    return built


def capturing() -> bool:
    """Whether somebody else captures the caller's stream."""
    return device_class.capturing()


def under_capture(site: Site, state0: Sequence[Tensor]) -> bool:
    """Whether somebody else captures the caller's stream: then nothing may be asked of the device, and nothing captured.

    Raises:
        RuntimeError: something about the region is still to be decided, which takes a question.
    """
    if not capturing():
        return False
    coupling_unknown = site.rows is None and all(s.dim() > 0 and s.shape[0] > 1 for s in state0)
    if site.verdict == "pending" or coupling_unknown:
        raise RuntimeError(
            f"fixed-point region at {site.spec.where}: expected a first call outside the capture of a CUDA graph: it decides "
            "whether the solve may stand in for the loop. Fix: run the model once, forward and backward, before you capture it"
        )
    return True


def _make_room() -> None:
    """Drop the captured solve that has been idle longest, if there are too many; one that is still at work stays."""
    if len(_found) < MOST:
        return
    for key, entry in _found.items():
        if isinstance(entry, _Seen) or entry.finished():
            del _found[key]
            return


def end_with(site: Site) -> None:
    """Let the captured solves of a region go when its site does."""
    if not site.has_captures:
        site.has_captures = True
        weakref.finalize(site, _orphan, site.key).atexit = False


def _orphan(key: str) -> None:
    """Runs wherever the last reference to a site dies, maybe in the middle of what holds the lock: then `find` sweeps."""
    _orphans.append(key)
    if _lock.acquire(blocking=False):
        try:
            _sweep()
        finally:
            _lock.release()


def _sweep() -> None:
    """Drop the captured solves of regions that are gone; those still at work wait for the next time."""
    for _ in range(len(_orphans)):
        key, busy = _orphans.popleft(), False
        for full, entry in list(_found.items()):
            if full[0] == key:
                if isinstance(entry, _Seen) or entry.finished():
                    del _found[full]
                else:
                    busy = True
        if busy:
            _orphans.append(key)


def held(kind: type[T]) -> list[T]:
    """All captured solves of a kind, those that ended up in the loop included."""
    return [entry for entry in _found.values() if isinstance(entry, kind)]


def used() -> tuple[list[str], list[str]]:
    """The engines of all captured solves that are held, and the reasons why some are not on a better one."""
    every = held(Captured)
    return sorted({h.name for h in every}), sorted({h.reason for h in every} - {""})


def clear() -> None:
    """Forget all captured solves; waits for none, so only to be called when the device is idle."""
    with _lock:
        _found.clear()
        _orphans.clear()


