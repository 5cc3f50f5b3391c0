"""Parts of torch that are no public interface, each with what is lost where a torch does not have it.

A name that is missing is an `Absent`, and `MISSING` says why. Whoever touches it gets an `Unavailable`: a feature stays off, or
leaves what it looked at as it is; the import of this package and the user's compile go on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
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


# Features by the names that they need, in words for `explain`; a name that is found lets its feature be.
REGIONS, BODIES, INDUCTOR = "regions", "bodies traced ahead of time (they run in eager mode)", "Inductor"
BATCHED, BREAKS = "batched gradients of regions", "graph breaks in the report"
SETTINGS, BY_NAME = "checks of Inductor's settings", 'torch.compile(backend="deq") by name, from a plain checkout'
_FEATURE: dict[str, str] = {}  # name -> what needs it
_LOST: dict[str, str] = {}
PARTS: list[tuple[str, str, str]] = []  # (module, name, feature) of those that were looked up


def _part(module: str, name: str, feature: str = "", otherwise: Any = _NOTHING) -> Any:
    _FEATURE[name] = feature
    PARTS.append((module, name, feature))
    found = find(module, name, otherwise)
    if feature and (found is otherwise or isinstance(found, Absent)):
        _LOST[feature] = f"no {name} ({MISSING[name]})"
    return found


def lost() -> dict[str, str]:
    """Features that this torch does not have the parts for: what is off -> why. A module that nobody has imported yet is not
    looked into."""
    for late, (module, *_) in _LATE.items():
        if late not in globals() and module in sys.modules:
            __getattr__(late)
    return dict(_LOST)


def _copy_each(targets: Sequence[Any], sources: Sequence[Any], non_blocking: bool = False) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking)


# Without it a decorated function inside an outer torch.compile has the outer options.
annotate = _part("torch.fx.traceback", "annotate", otherwise=lambda mark: contextlib.nullcontext())
# Without it TORCH_TRACE does not show the rewritten graph.
trace_structured = _part("torch._logging._internal", "trace_structured", otherwise=lambda *_, **__: None)
# Without it operands are copied one by one into a captured graph.
foreach_copy_ = _part("torch", "_foreach_copy_", otherwise=_copy_each)
# Without one of these the operator goes through the dispatcher once more.
DispatchKeySet = _part("torch._C", "DispatchKeySet", otherwise=None)
after_inplace_keyset = _part("torch._C", "_after_ADInplaceOrView_keyset", otherwise=None)
# Without it a region whose ticket was copied is found as long as its model lives.
saved_tensors_hooks = _part("torch._C._autograd", "_top_saved_tensors_default_hooks", otherwise=lambda _: None)
# Without them a fixed point under fake tensors alone is not told from a real one.
dispatch_mode = _part("torch._C", "_get_dispatch_mode", otherwise=lambda key: None)
dispatch_mode_key = _part("torch._C", "_TorchDispatchModeKey", otherwise=None)

# Without one of these no graph is rewritten.
enter_autocast = _part("torch.amp.autocast_mode", "_enter_autocast", REGIONS)
exit_autocast = _part("torch.amp.autocast_mode", "_exit_autocast", REGIONS)
set_grad_enabled = _part("torch._C", "_set_grad_enabled", REGIONS)
FakeTensorMode = _part("torch._subclasses.fake_tensor", "FakeTensorMode", REGIONS)
FakeTensor = _part("torch._subclasses.fake_tensor", "FakeTensor", REGIONS)
is_functorch_wrapped = _part("torch._C._functorch", "is_functorch_wrapped_tensor", REGIONS)
is_wrapper_subclass = _part("torch.utils._python_dispatch", "is_traceable_wrapper_subclass", REGIONS)
TorchDispatchMode = _part("torch.utils._python_dispatch", "TorchDispatchMode", REGIONS, object)
pytree = _part("torch.utils", "_pytree", REGIONS)
OpOverload = _part("torch._ops", "OpOverload", REGIONS)
HigherOrderOperator = _part("torch._ops", "HigherOrderOperator", REGIONS)
below_autograd = _part("torch._C", "_AutoDispatchBelowAutograd", REGIONS)
after_autograd_keyset = _part("torch._C", "_after_autograd_keyset", REGIONS)

DispatchKey = _part("torch._C", "DispatchKey", REGIONS)
force_dispatch_keys = _part("torch._C", "_ForceDispatchKeyGuard", REGIONS)
included_keys = _part("torch._C", "_dispatch_tls_local_include_set", REGIONS)
excluded_keys = _part("torch._C", "_dispatch_tls_local_exclude_set", REGIONS)

# Without one of these a gradient of a region that is batched (vmap, `is_grads_batched`) raises.
functorch = _part("torch._C", "_functorch", BATCHED)
vmapmode_increment = _part("torch._C", "_vmapmode_increment_nesting", BATCHED)
vmapmode_decrement = _part("torch._C", "_vmapmode_decrement_nesting", BATCHED)
add_batch_dim = _part("torch", "_add_batch_dim", BATCHED)
remove_batch_dim = _part("torch", "_remove_batch_dim", BATCHED)

# Parts whose modules are dear to import (Dynamo, Inductor, sympy): looked up when somebody first asks, so that the package's
# import costs little. (module, name, feature, in its place)
_LATE: dict[str, tuple[str, str, str, Any]] = {
    "counters": ("torch._dynamo.utils", "counters", BREAKS, defaultdict(Counter)),
    "dynamo_config": ("torch._dynamo", "config", "more than a few explanations of one model", None),
    "dynamo_backends": ("torch._dynamo.backends", "registry", BY_NAME, None),
    "free_unbacked_symbols": ("torch.fx.experimental.symbolic_shapes", "free_unbacked_symbols", REGIONS, _NOTHING),
    "partition": ("torch._functorch.partitioners", "min_cut_rematerialization_partition", BODIES, _NOTHING),
    "TracingContext": ("torch._guards", "TracingContext", BODIES, _NOTHING),
    "tracing": ("torch._guards", "tracing", BODIES, _NOTHING),
    "make_fx": ("torch.fx.experimental.proxy_tensor", "make_fx", BODIES, _NOTHING),
    "aot_eager": ("torch._dynamo.backends.debugging", "aot_eager", "aot_eager (graphs run as they are)", None),
    "compile_fx": ("torch._inductor.compile_fx", "compile_fx", INDUCTOR, None),
    "compile_fx_inner": ("torch._inductor.compile_fx", "compile_fx_inner", INDUCTOR, None),
    "inductor_config": ("torch._inductor", "config", INDUCTOR, None),
    "list_mode_options": ("torch._inductor", "list_mode_options", "modes of Inductor", lambda mode: {}),
    "list_options": ("torch._inductor", "list_options", SETTINGS, None),
    "select_decomp_table": ("torch._inductor.decomposition", "select_decomp_table", INDUCTOR, None),
    "get_cpp_compiler": ("torch._inductor.cpp_builder", "get_cpp_compiler", "", lambda: ""),
    "InvalidCxxCompiler": ("torch._inductor.exc", "InvalidCxxCompiler", "", RuntimeError),
    "CppCodeCache": ("torch._inductor.codecache", "CppCodeCache", "C++ kernels (ATen serves)", None),
    "inductor_cache_dir": ("torch._inductor.runtime.cache_dir_utils", "cache_dir", "", tempfile.gettempdir),
}  # fmt: skip
NEEDED = tuple(name for name, feature in _FEATURE.items() if feature == REGIONS) + ("free_unbacked_symbols",)


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = _part(*_LATE[name])
    return found


# Without them a capture that failed leaves its memory pool behind.
end_allocate_to_pool = _part("torch._C", "_cuda_endAllocateToPool")
release_pool = _part("torch._C", "_cuda_releasePool")
# Without it nothing is captured: cuBLAS would go on working in the memory of a graph. A build without CUDA has none.
clear_workspaces = _part("torch._C", "_cuda_clearCublasWorkspaces")


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
    found = [getattr(_setting(path), name, None) for path, name in _CUDA_SETTINGS]
    return (*found, torch.are_deterministic_algorithms_enabled())


@functools.cache
def _setting(path: str) -> Any:
    """A part of torch by its path; None where there is none."""
    part: Any = torch
    for name in path.split("."):
        part = getattr(part, name, None)
    return part
