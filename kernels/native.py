"""The C++ kernels for a CPU: compiled once by Inductor's code cache, called through ctypes.

There are none where there is no compiler, where compilation fails, where DEQ_COMPILE_NATIVE=0 is set, or where no folder for the
library belongs to this user alone (`folder.py`; DEQ_COMPILE_CACHE_DIR names one); callers then use ATen. Compilation takes two
to three seconds and is cached on disk by a hash of source and flags.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import platform
import struct
from pathlib import Path
from typing import Any

import torch

from . import ahead, folder, workspace

log = logging.getLogger("deq_compile.kernels")

_SOURCES = ("vector.h", "iteration/stopping.h", "broyden/cpu.cpp", "reuse/cpu.cpp", "reuse/multisecant.cpp", "gcr/cpu.cpp")
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
# Below this many elements a parallel region costs more than it saves.
_PARALLEL_ELEMENTS = 1 << 15

# Why there are none, since the last look; "" where there are.
_reason = ""

_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Broyden(ctypes.Structure):
    """The C++ struct of the same name."""

    _fields_ = [
        *((name, _I) for name in ("B", "D", "M", "ld", "threads", "relative")),
        *((name, _D) for name in ("tol", "floor", "eta")),
        *((name, _P) for name in ("S", "C", "best", "mark", "ceiling", "z_best", "n", "iterations", "stall", "done")),
        ("solve_info", _P),
        ("converged", _I),
    ]  # fmt: skip


class Operator(ctypes.Structure):
    """The C++ struct of the same name."""

    _fields_ = [("slots", _I), ("ld", _I), ("S", _P), ("V", _P), ("n", _P)]


class Gcr(ctypes.Structure):
    """The C++ struct of the same name."""

    _fields_ = [
        *((name, _P) for name in ("m", "s", "q", "x", "r", "w", "norms", "relative")),
        *((name, _D) for name in ("tol", "tiny", "batch_norm")), ("active", _I),
    ]  # fmt: skip


# The same, for writing a whole struct into a buffer: ctypes takes ten times as long.
BROYDEN, GCR = struct.Struct("6q3d11qq"), struct.Struct("8q3dq")
assert (BROYDEN.size, GCR.size) == (ctypes.sizeof(Broyden), ctypes.sizeof(Gcr))


class Functions:
    """The entry points for one dtype."""

    def __init__(self, library: ctypes.CDLL, suffix: str) -> None:
        def entry(name: str, arguments: list[Any], result: Any = None) -> Any:
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, result
            return function

        self.start = entry("broyden_start", [_P, _P, _P])
        self.step = entry("broyden_step", [_P, _P, _P, _P, _I, _I], _I)
        self.transpose = entry("reuse_transpose", [_P, _P, _P])
        self.multisecant = entry("multisecant", [_P, _P, _I, _I, _D, _D])
        self.multisecant_apply = entry("multisecant_apply", [_P, _I, _I, _I, _P, _P])
        self.gcr_start = entry("gcr_start", [_P])
        self.gcr_step = entry("gcr_step", [_P, _P, _I, _I], _D)


def source() -> str:
    here = Path(__file__).resolve().parent
    return "\n".join((here / name).read_text() for name in _SOURCES)


@functools.cache
def _load() -> dict[torch.dtype, Functions] | None:
    global _reason
    ahead.wait()
    _reason = ""
    if os.environ.get("DEQ_COMPILE_NATIVE") == "0":
        _reason = "DEQ_COMPILE_NATIVE=0 switches them off"
        return None
    try:
        where = folder.private()
    except PermissionError as error:
        _reason = str(error)
        log.warning("no C++ kernels, going on with ATen, which takes longer: %s", error)
        return None
    flags = ["-ffp-contract=fast"]  # Inductor's flags switch contraction off
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    try:
        from deq_compile.torch_parts import CppCodeCache

        with folder.inductor_writes_to(where):
            loaded = CppCodeCache.load(source(), device_type="cpu", extra_flags=tuple(flags))
        library = getattr(loaded, "lib", loaded)
        return {dtype: Functions(library, suffix) for dtype, suffix in _SUFFIX.items()}
    except Exception as error:  # whatever a compiler or a loader may say: ATen serves
        _reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        log.info("no C++ kernels, going on with ATen: %s", _reason)
        return None


_forget = _load.cache_clear


def load_beside() -> None:
    """Load them in a thread, where that changes nothing for others: elsewhere Inductor writes to another folder meanwhile."""
    from deq_compile.torch_parts import inductor_cache_dir

    with contextlib.suppress(OSError):
        if folder.private() == Path(inductor_cache_dir()) and _load() is None:
            _forget()  # who needs them will try again, and say why not


def why_not() -> str:
    """Why there are no C++ kernels in this process; "" where there are. The first look compiles them."""
    _load()
    return _reason


def functions(*tensors: torch.Tensor) -> Functions | None:
    """The entry points for these tensors: all contiguous, on the CPU and of one dtype, fp32 or fp64; else None."""
    dtype = tensors[0].dtype
    if dtype not in _SUFFIX or any(t.dtype != dtype or t.device.type != "cpu" or not t.is_contiguous() for t in tensors):
        return None
    return functions_of(dtype)


def functions_of(dtype: torch.dtype) -> Functions | None:
    """The entry points for contiguous CPU tensors of a dtype, fp32 or fp64; None where there is no C++."""
    loaded = _load()
    return None if loaded is None else loaded.get(dtype)


class Parts:
    """Attributes of a state that lie in its arena: a tensor of them is made when somebody asks, since it costs more than the
    arithmetic on its row."""

    arena: workspace.Arena
    places: dict[str, workspace.Place]

    def __getattr__(self, name: str) -> torch.Tensor:
        place = self.__dict__.get("places", {}).get(name)
        if place is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = self.shaped(name, self.arena.tensor(place))
        setattr(self, name, found)
        return found

    def shaped(self, name: str, flat: torch.Tensor) -> torch.Tensor:
        """The part in the shape that its attribute has."""
        return flat


def threads_for(elements: int) -> int:
    return torch.get_num_threads() if elements >= _PARALLEL_ELEMENTS else 1
