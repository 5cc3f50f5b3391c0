"""What tracing and compiling cost beside their own work, made cheaper: CPython's frames and its collector.

Both make hundreds of thousands of objects, nearly all of which stay, and each full collection walks over all of them: a quarter
of a second with Inductor loaded, several times in a first step.

CPython (3.11 and later) has frames in chunks of 16 KiB, and gives the last one back as soon as the call that began it returns.
Calls at such a border, frequent in Dynamo's depths, map and unmap memory each time, a seventh of a first step. A chunk is as big
as the frame that begins it asks for, and the rest of it is free for the frames above.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

RARER = 10  # times
ROOM = 140_000  # of 8 bytes: a chunk of 2 MiB, of which the system gives the pages that are used


@contextlib.contextmanager
def seldom() -> Iterator[None]:
    """Ten times fewer full collections meanwhile; younger generations as ever. What somebody sets meanwhile stays."""
    usual = gc.get_threshold()
    rarer = (*usual[:2], usual[2] * RARER)
    gc.set_threshold(*rarer)
    try:
        yield
    finally:
        if gc.get_threshold() == rarer:
            gc.set_threshold(*usual)


def in_room(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """function(*args, **kwargs), by a frame that leaves room for those above it, and with few full collections."""
    with seldom():
        return function(*args, **kwargs)


in_room.__code__ = in_room.__code__.replace(co_stacksize=ROOM)
