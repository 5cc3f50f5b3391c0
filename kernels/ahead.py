"""What a first step asks of the C++ compiler, begun in a thread beside Dynamo's trace.

Inductor looks which vector instructions this CPU has: it compiles and runs three small programs one after the other, which takes
eight seconds with an empty cache and one with a full one. Our own kernels take four seconds more, once. Both wait for other
processes, so the trace goes on meanwhile. Whoever needs them waits for them; nothing depends on whether they were begun ahead.

That takes a torch whose settings are each thread's own (2.13): elsewhere one that is changed for a moment would be seen here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable

import torch

log = logging.getLogger("deq_compile.kernels")

LONGEST = 60.0  # seconds that a fork waits

_thread: threading.Thread | None = None
_looked = threading.Event()


def begin() -> None:
    """Once in a process, where the CPU is what a model is likely to run on. Never raises."""
    global _thread
    if _thread is not None or _models_run_elsewhere():
        return
    # All modules are imported here: two threads that import can get in each other's way.
    from deq_compile.torch_parts import CppCodeCache, SettingOfAThread, pick_vec_isa

    with contextlib.suppress(ImportError):
        importlib.import_module("torch.utils.cpp_extension")

    if SettingOfAThread is None or pick_vec_isa is None or not isinstance(CppCodeCache, type):
        return
    thread = threading.Thread(target=_work, args=(pick_vec_isa,), name="deq_compile-ahead", daemon=True)
    with contextlib.suppress(RuntimeError):  # no more threads can be started
        thread.start()
        _thread = thread
        if hasattr(os, "register_at_fork"):  # a fork has the thread's locks, and not the thread
            os.register_at_fork(before=functools.partial(wait, LONGEST))


def _models_run_elsewhere() -> bool:
    """Whether there is an accelerator. CUDA itself is not asked: a process that has done so cannot use it in its forks."""
    if torch.backends.mps.is_built() or getattr(torch.version, "xpu", None) is not None:
        return True
    return torch.backends.cuda.is_built() and torch.cuda.device_count() > 0  # which asks NVML


def _work(look: Callable[[], object]) -> None:
    try:
        look()
    except Exception as error:  # Inductor will meet it again, and say it
        log.info("no look at vector instructions ahead of time: %s", error)
    finally:
        _looked.set()
    from . import native

    native.load_beside()


def wait_for_look() -> None:
    """Until it is known which vector instructions there are, if that was begun."""
    while _thread is not None and _thread.is_alive() and not _looked.wait(0.05):
        pass


def wait(seconds: float | None = None) -> None:
    """Until all that was begun is done, or for so long."""
    if _thread is not None and _thread is not threading.current_thread():
        _thread.join(seconds)
