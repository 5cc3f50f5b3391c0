"""Full collections of garbage put off while code is compiled.

Tracing and compiling make hundreds of thousands of objects, nearly all of which stay, and each full collection walks over all of
them: a quarter of a second with Inductor loaded, several times in a first step.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

RARER = 10  # times


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
