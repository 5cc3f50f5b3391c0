"""Peak memory of a training step, from the resident set of the process.

Compiling takes hundreds of megabytes of its own, so two figures are told apart: the growth up to the end of the first
step, compilation included, and the growth of a later step above what lies in memory between steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from deq_compile.testing import workspace

STEPS = 3

# Freed blocks go back to the system at once, so that a peak is a peak of what is in use (glibc; elsewhere without effect).
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def resident() -> float:
    """MB in use now."""
    return psutil.Process().memory_info().rss / 2**20


def peak() -> float | None:
    """The largest resident set since the start or the last reset, MB; None where the system does not say.

    On Linux getrusage will not do: its figure starts at what the *parent* held when it started this process (the memory of
    before exec counts), and no reset lowers that.
    """
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return None
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found / 2**20 if sys.platform == "darwin" else found / 2**10


def reset_peak() -> bool:
    """Let `peak` start anew; whether the system can do that (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def release() -> None:
    """Give back what nobody uses, the pool of the solvers' buffers included: a peak counts what a step takes from it."""
    gc.collect()
    workspace.clear()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(run: Callable[[], Any]) -> dict[str, Any]:
    """First step in s, and MB above the baseline: `memory_first_mb` with compilation, `memory_mb` of a later step.

    `memory_mb` is None where the system cannot reset its peak.
    """
    release()
    before = resident()
    begun = time.perf_counter()
    run()
    found: dict[str, Any] = {"first_s": time.perf_counter() - begun, "memory_mb": None}
    highest = peak()
    found["memory_first_mb"] = None if highest is None else highest - before
    for _ in range(2):
        run()
    release()
    before = resident()
    if reset_peak():
        for _ in range(STEPS):
            run()
        highest = peak()
        found["memory_mb"] = None if highest is None else highest - before
    return found
