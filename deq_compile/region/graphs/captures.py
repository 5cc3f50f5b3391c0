"""What captured solves share, and where they are held: one for each region, direction, set of shapes, settings and thread."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from deq_compile.kernels import device as kernel_device
from deq_compile.region.site import Site

from .captured import Captured, Declined
from .device import Device
from .engines import told
from .operands import Operands, addresses

log = logging.getLogger("deq_compile.region")

# Captured solves that are held at a time, and the share of their device's memory that they may take: a solve keeps its states,
# and its graphs a workspace of cuBLAS (32 MiB on Hopper).
MOST = 32
MOST_OF_MEMORY = 0.25


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
) -> T | Declined | None:
    """The captured solve for a key; None where there is none yet, and a `Declined` where there will be none: the loop serves.

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
        tuple((o.shape, o.stride(), o.dtype, device_class.place(o)) for o in operands),
    )  # fmt: skip
    with _lock:
        if _orphans:
            _sweep()
        entry = _found.get(full)
        if entry is None:
            _make_room()
            reason = _elsewhere(state, operands)
            entry = _found[full] = Declined(reason) if reason else _Seen(addresses(operands))
            return entry if isinstance(entry, Declined) else None
        _found.move_to_end(full)
    if isinstance(entry, Captured):
        if not entry.hopeless:
            return entry  # type: ignore[return-value]  # a key has one kind of solve
        entry = _replaced(full, entry, operands)
    built = _built(state.device, operands, entry, build)
    if built.reason:
        log.info("region %s: %s", key[0], built.reason)
    with _lock:
        _found[full] = built
        _stay_within(state.device, full)
    return built


def _elsewhere(state: Tensor, operands: Sequence[Tensor]) -> str:
    """Why a graph cannot read the operands ("" where it can): one on another device is a number to it, that of the capture."""
    place = device_class.place(state)
    for operand in operands:
        if (where := device_class.place(operand)) != place:
            return f"an operand of shape {list(operand.shape)} is on {where}: a graph on {place} would keep the value it has now"
    return ""


def _replaced(full: Any, entry: Captured, operands: Sequence[Tensor]) -> _Seen:
    """What is known of a key whose captured solve goes: before another is made, so that there is memory for one at a time."""
    seen = _Seen(addresses(operands), frozenset(entry.operands.moved))
    with _lock:
        _found[full] = seen
    entry.wait()
    return seen


def _built(device: torch.device, operands: Sequence[Tensor], seen: _Seen, build: Callable[[Device, Operands], T]) -> T | Declined:
    """Where even warming up fails, the loop serves: it raises what the body has to say, or needs less memory."""
    try:
        built = build(device_class(device), Operands(operands, seen.addresses, seen.copy))
    except Exception as error:
        return Declined(told(error))
    return Declined(built.reason) if built.engine is None else built  # buffers that nothing will use go


def made_current(device: torch.device) -> AbstractContextManager[None]:
    """Inside, kernels are launched on `device`, whichever the caller's current device is."""
    return device_class.current(device)


def current_device(like: torch.device) -> torch.device:
    """The caller's current device of the type of `like`."""
    return device_class.current_device(like)


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


def _stay_within(device: torch.device, newest: Any) -> None:
    """Drop captured solves of a device, those idle longest first, while they take more of its memory than they may.

    The newest one stays, and so does what is still at work. How bytes are counted: see `Captured.bytes`.
    """
    of_device = [(key, entry) for key, entry in _found.items() if isinstance(entry, Captured) and entry.on(device)]
    sizes = {key: entry.bytes() for key, entry in of_device}
    excess = sum(sizes.values()) - MOST_OF_MEMORY * device_class.memory(device)
    for key, entry in of_device:
        if excess <= 0:
            return
        if key != newest and entry.finished():
            del _found[key]
            excess -= sizes[key]


def end_with(site: Site) -> None:
    """Let the captured solves of a region go when its site does."""
    if not site.has_captures:
        site.has_captures = True
        weakref.finalize(site, _orphan, site.key).atexit = False


def _orphan(key: str) -> None:
    """Runs wherever the last reference to a site dies, maybe in the middle of what holds the lock: then `find` sweeps."""
    _orphans.append(key)
    # Inside a capture, whoever's, the device may not be asked whether a solve has ended.
    if not capturing() and _lock.acquire(blocking=False):
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
    with _lock:
        return [entry for entry in _found.values() if isinstance(entry, kind)]


def used() -> tuple[list[str], list[str]]:
    """The engines of all captured solves that are held, and the reasons why some are not on a better one."""
    every = held(Captured)
    return sorted({h.name for h in every}), sorted({h.reason for h in every} - {""})


def clear() -> None:
    """Forget all captured solves; waits for those still at work, since their graphs and buffers go."""
    with _lock:
        entries = list(_found.values())
        _found.clear()
        _orphans.clear()
    for entry in entries:
        if isinstance(entry, Captured):
            entry.wait()
