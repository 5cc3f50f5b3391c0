"""One compilation at a time; and what tracing and compiling cost beside their own work, made cheaper: frames and the collector.

Both make hundreds of thousands of objects, nearly all of which stay, and each full collection walks over all of them: a quarter
of a second with Inductor loaded, several times in a first step.

CPython (3.11 and later) has frames in chunks of 16 KiB, and gives the last one back as soon as the call that began it returns.
Calls at such a border, frequent in Dynamo's depths, map and unmap memory each time, a seventh of a first step. A chunk is as big
as the frame that begins it asks for, and the rest of it is free for the frames above.

Inductor notes what it makes in places of the whole process, and counts on Dynamo's lock to be alone. Dynamo holds it around its
own compilations; bodies and graphs that are compiled when they are first run are not among them.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from .torch_parts import compile_lock

P = ParamSpec("P")
T = TypeVar("T")

RARER, MOST = 10, 2**31 - 1  # times; what CPython takes for a threshold
ROOM = 140_000  # of 8 bytes: a chunk of 2 MiB, of which the system gives the pages that are used

_lock = threading.Lock()


class _Alone:
    """A lock that one thread may take several times: Dynamo's, where Dynamo is there, and then one of ours. Always in this order:
    compiling a body may trace with Dynamo, and Dynamo's compilations look up bodies."""

    def __init__(self) -> None:
        self.own = threading.RLock()
        self.taken: list[Any] = []  # Dynamo's, or None, by those that are inside; changed by who holds `own`

    def __enter__(self) -> None:
        dynamos = compile_lock()
        if dynamos is not None:
            dynamos.acquire()
        self.own.acquire()
        self.taken.append(dynamos)

    def __exit__(self, *_: object) -> None:
        dynamos = self.taken.pop()
        self.own.release()
        if dynamos is not None:
            dynamos.release()


alone = _Alone()
_inside = 0  # how many are, in all threads
_usual, _rarer = (0, 0, 0), (0, 0, 0)


@contextlib.contextmanager
def seldom() -> Iterator[None]:
    """Ten times fewer full collections meanwhile; younger generations as ever. What somebody sets meanwhile stays. Blocks may lie
    in each other, and overlap in several threads: the first begins it, the last one ends it."""
    global _inside, _usual, _rarer
    with _lock:
        if not _inside:
            _usual = gc.get_threshold()
            _rarer = (*_usual[:2], max(_usual[2], min(_usual[2] * RARER, MOST)))
            gc.set_threshold(*_rarer)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and gc.get_threshold() == _rarer:
                gc.set_threshold(*_usual)


def in_room(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """function(*args, **kwargs), by a frame that leaves room for those above it, and with few full collections."""
    with seldom():
        return function(*args, **kwargs)


in_room.__code__ = in_room.__code__.replace(co_stacksize=ROOM)
