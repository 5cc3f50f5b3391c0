"""Parts of torch that are no public interface, each with what is lost where a torch does not have it.

A name that is missing is an `Absent`, and `MISSING` says why. Whoever touches it gets an `Unavailable`: a feature stays off, or
leaves what it looked at as it is; the import of this package and the user's compile go on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections import Counter, defaultdict
from typing import Any

import torch

MISSING: dict[str, str] = {}  # name -> why this torch does not have it


class Unavailable(AttributeError):
    """This torch does not have a part that was asked for."""


class Absent:
    """Stands for a missing name. No use of it succeeds: an `isinstance` that came out false could be a wrong answer."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def _refuse(self, *_: Any, **__: Any) -> Any:
        name = self.__dict__["_name"]
        raise Unavailable(f"torch {torch.__version__} has no {name}: {MISSING.get(name, '')}")

    __call__ = __getattr__ = __setattr__ = __instancecheck__ = _refuse


_NOTHING = object()


def find(module: str, name: str, otherwise: Any = _NOTHING) -> Any:
    """A name of a module; where there is none, `otherwise`, by default an `Absent`."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        MISSING[name] = f"{type(error).__name__}: {error}"
        return Absent(name) if otherwise is _NOTHING else otherwise


# Without it a decorated function inside an outer torch.compile has the outer options.
annotate = find("torch.fx.traceback", "annotate", lambda mark: contextlib.nullcontext())
# Without it TORCH_TRACE does not show the rewritten graph.
trace_structured = find("torch._logging._internal", "trace_structured", lambda *_, **__: None)

# Without one of these no graph is rewritten (`NEEDED`).
enter_autocast = find("torch.amp.autocast_mode", "_enter_autocast")
exit_autocast = find("torch.amp.autocast_mode", "_exit_autocast")
FakeTensorMode = find("torch._subclasses.fake_tensor", "FakeTensorMode")
FakeTensor = find("torch._subclasses.fake_tensor", "FakeTensor")
is_functorch_wrapped = find("torch._C._functorch", "is_functorch_wrapped_tensor")
is_wrapper_subclass = find("torch.utils._python_dispatch", "is_traceable_wrapper_subclass")
TorchDispatchMode = find("torch.utils._python_dispatch", "TorchDispatchMode", object)
NEEDED = (
    "_enter_autocast", "_exit_autocast", "FakeTensorMode", "FakeTensor", "is_functorch_wrapped_tensor",
    "is_traceable_wrapper_subclass", "TorchDispatchMode", "free_unbacked_symbols",
)  # fmt: skip

# Parts whose modules are dear to import (Dynamo, sympy): looked up when somebody first asks, so that the package's import costs
# little. Without the counters `explain` knows nothing of graph breaks.
_LATE = {
    "counters": ("torch._dynamo.utils", "counters", defaultdict(Counter)),
    "free_unbacked_symbols": ("torch.fx.experimental.symbolic_shapes", "free_unbacked_symbols", _NOTHING),
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = find(*_LATE[name])
    return found


# Without them a capture that failed leaves its memory pool behind.
end_allocate_to_pool = find("torch._C", "_cuda_endAllocateToPool")
release_pool = find("torch._C", "_cuda_releasePool")
# Without it nothing is captured: cuBLAS would go on working in the memory of a graph. A build without CUDA has none.
clear_workspaces = find("torch._C", "_cuda_clearCublasWorkspaces")


def pool_segments(pool: Any) -> list[dict[str, Any]]:
    """The segments of memory that a private pool of captured graphs has, with their sizes ("total_size") in bytes; none where
    this torch cannot say."""
    try:
        found: list[dict[str, Any]] = torch.cuda.memory_snapshot(pool, include_traces=False)
    except (TypeError, RuntimeError):  # an older signature; an allocator that keeps no such list
        return []
    return found


# Settings that choose the kernels of a CUDA operation. Of the two ways to ask for TF32, torch's older functions raise where
# somebody used the newer ones; the names here answer under both.
_CUDA_SETTINGS = (
    ("backends", "fp32_precision"),
    ("backends.cuda.matmul", "fp32_precision"),
    ("backends.cudnn.conv", "fp32_precision"),
    ("backends.cudnn.rnn", "fp32_precision"),
    ("backends.cuda.matmul", "allow_fp16_reduced_precision_reduction"),
    ("backends.cuda.matmul", "allow_fp16_reduced_precision_reduction_split_k"),
    ("backends.cuda.matmul", "allow_bf16_reduced_precision_reduction"),
    ("backends.cuda.matmul", "allow_bf16_reduced_precision_reduction_split_k"),
    ("backends.cuda.matmul", "allow_fp16_accumulation"),
    ("backends.cudnn", "enabled"),
    ("backends.cudnn", "benchmark"),
    ("backends.cudnn", "deterministic"),
)


def cuda_settings() -> tuple[Any, ...]:
    """What of the process's settings a captured graph has built in: hashable, and another one where a setting changed. None
    stands for a setting that this torch does not have."""
    found = [getattr(_part(path), name, None) for path, name in _CUDA_SETTINGS]
    return (*found, torch.are_deterministic_algorithms_enabled())


@functools.cache
def _part(path: str) -> Any:
    """A part of torch by its path; None where there is none."""
    part: Any = torch
    for name in path.split("."):
        part = getattr(part, name, None)
    return part
