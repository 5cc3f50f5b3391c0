"""What a first step asks of the C++ compiler, begun in a thread beside Dynamo's trace.

Inductor looks which vector instructions this CPU has: it compiles and runs three small programs one after the other, which takes
eight seconds with an empty cache and one with a full one. Our own kernels take four seconds more, once. Both wait for other
processes, so the trace goes on meanwhile. Whoever needs them waits for them, and so does a fork and the end of the process. What
did not work, or was found under other settings than those of the first step, is asked anew: nothing depends on the thread.

That takes a torch whose settings are each thread's own (2.13): elsewhere one that is changed for a moment would be seen here.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import functools
import importlib
import logging
import os
import threading
from typing import Any

import torch

from . import remembered

log = logging.getLogger("deq_compile.kernels")

LONGEST = 60.0  # seconds that a fork and the end of the process wait

_thread: threading.Thread | None = None
_looked = threading.Event()
_settings: tuple[Any, ...] = ()  # of the thread; empty once they have been compared


def begin() -> None:
    """Once in a process, where the CPU is what a model is likely to run on. Never raises."""
    global _thread, _settings
    if _thread is not None or _models_run_elsewhere():
        return
    # All modules are imported here: two threads that import can get in each other's way.
    from deq_compile.torch_parts import CppCodeCache, SettingOfAThread, VecISA, valid_isas

    remembered.recall()
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.utils.cpp_extension")
    if SettingOfAThread is None or VecISA is None or valid_isas is None or not isinstance(CppCodeCache, type):
        return
    settings = _asked_with()
    # In a copy of the context, where the user's settings are.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(_work,), name="deq_compile-ahead", daemon=True)
    with contextlib.suppress(RuntimeError):  # no more threads can be started
        thread.start()
        _thread, _settings = thread, settings
        atexit.register(wait, LONGEST)  # what is half written must not be found by the next process
        if hasattr(os, "register_at_fork"):  # a fork has the thread's locks, and not the thread
            os.register_at_fork(before=functools.partial(wait, LONGEST))


def _models_run_elsewhere() -> bool:
    """Whether there is an accelerator. CUDA itself is not asked: a process that has done so cannot use it in its forks."""
    if torch.backends.mps.is_built() or getattr(torch.version, "xpu", None) is not None:
        return True
    return torch.backends.cuda.is_built() and torch.cuda.device_count() > 0  # which asks NVML


def _asked_with() -> tuple[Any, ...]:
    """What the answers depend on."""
    from deq_compile.torch_parts import inductor_cache_dir, inductor_config

    cpp = getattr(inductor_config, "cpp", None)
    return inductor_cache_dir(), *(getattr(cpp, name, None) for name in ("cxx", "vec_isa_ok"))


def _work() -> None:
    from . import native

    try:
        whole = _look()
    except Exception as error:  # Inductor will meet it again, and say it
        log.info("no look at vector instructions ahead of time: %s", error)
        whole = False
    if not whole:
        _forget()
    _looked.set()
    native.load_beside()


def _look() -> bool:
    """Whether all instructions that this CPU has were found to work. A program that was interrupted looks like one that fails."""
    from deq_compile.torch_parts import flags_of_cpu, known_isas, valid_isas

    flags, found = flags_of_cpu(), [str(isa) for isa in valid_isas()]
    wanted = [str(isa) for isa in known_isas if all(flag in flags for flag in str(isa).split())]
    return found == wanted if flags else bool(found)


def _forget() -> None:
    """Let Inductor look again."""
    from deq_compile.torch_parts import VecISA, valid_isas

    kinds = [VecISA]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for cached in (valid_isas, *(value for kind in kinds for value in vars(kind).values())):
        getattr(cached, "cache_clear", lambda: None)()


def wait_for_look() -> None:
    """Until it is known which vector instructions there are, if that was begun."""
    global _settings
    if _thread is None or not _settings:
        return
    while _thread.is_alive() and not _looked.wait(0.05):
        pass
    changed, _settings = _settings != _asked_with(), ()
    if changed:
        wait()
        _forget()


def wait(seconds: float | None = None) -> None:
    """Until all that was begun is done, or for so long."""
    if _thread is not None and _thread is not threading.current_thread():
        _thread.join(seconds)
