"""Parts of torch that are no public interface, each with what is lost where a torch does not have it.

A name that is missing, or that does not do what it did (`test`), is an `Absent`, or has something in its place; `MISSING` says
why, and `lost` what is off, in words for users. Whoever touches an `Absent` gets an `Unavailable`: a feature stays off, or leaves
what it looked at as it is; the import of this package and the user's compile go on. Dynamo's own parts are in capture/dynamo.py.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from .absent import MISSING as MISSING
from .absent import NOTHING as NOTHING
from .absent import Absent as Absent
from .absent import Test as Test
from .absent import Unavailable as Unavailable
from .absent import find as find

# What is lost without a part, in words for `explain`.
REGIONS = "fixed-point regions (graphs go to the inner backend as they are)"
BODIES = "bodies traced ahead of time (they run in eager mode)"
INDUCTOR = "Inductor (aot_eager compiles in its place)"
SIZES = "bodies compiled for many sizes at a time (each size is compiled by itself, some of them)"
BATCHED = "batched gradients of regions (they raise)"
BREAKS = "graph breaks in the report"
SHORTCUT = "a shortcut past torch's dispatcher (a call takes longer)"
SCOPED = "options of a decorated function inside another torch.compile (the outer ones hold)"
TRACE = "the rewritten graph in TORCH_TRACE"
COPIES = "copying the operands of a captured graph in one call (it takes longer)"
COPIED = "freeing a region as soon as its last backward is done, where hooks copy saved tensors (it lives as long as its model)"
PLACES = "errors that say why fixed_point cannot stand inside of a tracer or a transform"
TANGENTS = "a quick test for forward-mode AD (it takes longer)"
AGAIN = "differentiating fixed_point more than once"
VIEWS = "gradients of regions without a last copy"
ASSERTED = "loops beside assertions about sizes"
CLASSES = "the decorator on a class of modules"
MODES, SETTINGS = "modes of Inductor (they are ignored)", "checks of Inductor's settings (they are passed on unseen)"
COMPILER = "a look for a C++ compiler before Inductor starts"
FOLDERS = "Inductor's folder as the place of our C++ kernels"
KERNELS = "C++ kernels (ATen serves)"
BY_NAME = 'torch.compile(backend="deq") by name, from a plain checkout'
RANKS = "agreement of ranks (each decides about its regions alone)"
LIMITS, AOT_EAGER = "more than a few explanations of one model", "aot_eager (graphs run as they are)"
EXPORTS = "solvers in exported programs (the user's own loop is exported)"
POOLS, CAPTURES = "freeing the memory of a CUDA graph whose capture failed", "CUDA graphs"

_FEATURE: dict[str, str] = {}  # name -> what needs it
_LOST: dict[str, str] = {}
PARTS: list[tuple[str, str, str]] = []  # (module, name, feature) of those that were looked up


def _part(module: str, name: str, feature: str, otherwise: Any = NOTHING, test: Test | None = None, key: str = "") -> Any:
    """`feature` is what is lost without it; "" where nothing is."""
    key = key or name
    _FEATURE[key] = feature
    PARTS.append((module, name, feature))
    found = find(module, name, otherwise, test, key)
    if feature and key in MISSING:
        _LOST.setdefault(feature, MISSING[key])
    return found


def lost() -> dict[str, str]:
    """Features that this torch does not have the parts for: what is off -> why. A module that nobody has imported yet is not
    looked into."""
    for late, (module, *_) in _LATE.items():
        if late not in globals() and module in sys.modules:
            __getattr__(late)
    return dict(_LOST)


def _expect(true: object) -> None:
    if not true:
        raise ValueError("it failed its test")


# ---- what is used by its looks alone, or has something in its place

annotate = _part("torch.fx.traceback", "annotate", SCOPED, lambda mark: contextlib.nullcontext())
trace_structured = _part("torch._logging._internal", "trace_structured", TRACE, lambda *_, **__: None)
saved_tensors_hooks = _part("torch._C._autograd", "_top_saved_tensors_default_hooks", COPIED, lambda _: None)


def _copy_each(targets: Sequence[Any], sources: Sequence[Any], non_blocking: bool = False) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking)


def _copies(copy: Any) -> None:
    copy([target := torch.zeros(1)], [torch.ones(1)])
    _expect(target.item() == 1)


foreach_copy_ = _part("torch", "_foreach_copy_", COPIES, _copy_each, _copies)


def _qualified(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"


qualified_name = _part("torch.fx.node", "_get_qualified_name", "", _qualified)
assert_scalar = _part("torch", "ops.aten._assert_scalar.default", ASSERTED, None)
check_size = _part("torch", "_check", ASSERTED, None)
_base_of = _part("torch", "Tensor._base", VIEWS, None)


# The number of the backward that the engine is at in this thread.
graph_task = _part("torch._C", "_current_graph_task_id", AGAIN, None)


def is_view(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be a view of another."""
    return _base_of is None or tensor._base is not None


_forward_ad = find("torch.autograd", "forward_ad")
_has_level = _part("torch.autograd.forward_ad", "_current_level", TANGENTS, None) is not None


def forward_mode() -> bool:
    """Whether forward-mode AD may be at work in this thread."""
    return not _has_level or _forward_ad._current_level >= 0


# ---- where a fixed point is asked for (region/surroundings.py)

dispatch_mode = _part("torch._C", "_get_dispatch_mode", PLACES, lambda key: None)
dispatch_mode_key = _part("torch._C", "_TorchDispatchModeKey", PLACES, None)
is_jit_tracing = _part("torch.jit", "is_tracing", PLACES, lambda: False)
proxy_mode = _part("torch.fx.experimental.proxy_tensor", "get_proxy_mode", PLACES, lambda: None)
transform = _part("torch._C._functorch", "peek_interpreter_stack", PLACES, lambda: None)

is_batched = _part("torch._C._functorch", "is_batchedtensor", BATCHED, lambda tensor: False)
is_batched_by_autograd = _part("torch._C._functorch", "is_legacy_batchedtensor", BATCHED, lambda tensor: False)
transforms_put_aside = _part("torch._functorch.pyfunctorch", "temporarily_clear_interpreter_stack", BATCHED)
batch_level = _part("torch._C._functorch", "maybe_get_level", BATCHED)
batch_dim = _part("torch._C._functorch", "maybe_get_bdim", BATCHED)
unbatched = _part("torch._C._functorch", "get_unwrapped", BATCHED)
batch_again = _part("torch._C._functorch", "_add_batch_dim", BATCHED)
vmapmode_increment = _part("torch._C", "_vmapmode_increment_nesting", BATCHED)
vmapmode_decrement = _part("torch._C", "_vmapmode_decrement_nesting", BATCHED)
add_batch_dim = _part("torch", "_add_batch_dim", BATCHED)
remove_batch_dim = _part("torch", "_remove_batch_dim", BATCHED)

# ---- without one of these no graph is rewritten

enter_autocast = _part("torch.amp.autocast_mode", "_enter_autocast", REGIONS)
exit_autocast = _part("torch.amp.autocast_mode", "_exit_autocast", REGIONS)
enter_inference_mode = _part("torch.autograd.grad_mode", "_enter_inference_mode", "", None)
exit_inference_mode = _part("torch.autograd.grad_mode", "_exit_inference_mode", "", None)
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
included_keys = _part("torch._C", "_dispatch_tls_local_include_set", REGIONS)
excluded_keys = _part("torch._C", "_dispatch_tls_local_exclude_set", REGIONS)
_part("torch", "ops.aten.add.Tensor._schema", REGIONS)
_part("torch", "UntypedStorage._cdata", REGIONS)
_part("torch.fx", "Node._erased", REGIONS)

RECORDING = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")  # what autograd records by


def _records_again(force: Any) -> None:
    """Where it did not, all gradients of a region would be zero, in silence."""
    x = torch.ones(1, requires_grad=True)
    with torch.enable_grad(), below_autograd():
        _expect(not (2 * x).requires_grad)
        excluded = excluded_keys()
        for key in RECORDING:
            excluded = excluded.remove(DispatchKey.__members__[key])
        with force(included_keys(), excluded):
            _expect((2 * x).requires_grad)


force_dispatch_keys = _part("torch._C", "_ForceDispatchKeyGuard", REGIONS, test=_records_again)


def schema_of(operator: Any) -> Any:
    """The schema of an `OpOverload`."""
    return operator._schema


def storage_id(tensor: torch.Tensor) -> int:
    """Equal for tensors that share their memory, fake ones too."""
    return int(tensor.untyped_storage()._cdata)


def is_erased(node: torch.fx.Node) -> bool:
    return bool(node._erased)


def source_of(node: torch.fx.Node) -> Any:
    """Where Dynamo has a placeholder from; None where it does not say."""
    return getattr(node, "_dynamo_source", None)


def copy_source(old: torch.fx.Node, new: torch.fx.Node) -> None:
    """AOTAutograd asks inputs where they come from, which no copy of a node carries over."""
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source


# ---- the operator's shortcut: the kernel without the dispatcher (region/op.py)

_DEVICES = ("CPU", "CUDA")


def _is_dense_after(keyset: Any) -> None:
    """What is left of the keys of a call that autograd has seen, after autograd, is the device."""
    for device in _DEVICES:
        members = DispatchKey.__members__
        seen = DispatchKeySet(members[device]) | DispatchKeySet(members[f"Autograd{device}"])
        _expect((seen & keyset).raw_repr() == DispatchKeySet(members[device]).raw_repr())


DispatchKeySet = _part("torch._C", "DispatchKeySet", SHORTCUT, None)
after_inplace_keyset = _part("torch._C", "_after_ADInplaceOrView_keyset", SHORTCUT, None, _is_dense_after)
# Where one of these is what comes after autograd, the kernel can be called at once; empty where torch cannot say.
dense_keys: set[int] = set()
if after_inplace_keyset is not None:
    dense_keys = {DispatchKeySet(DispatchKey.__members__[device]).raw_repr() for device in _DEVICES}

# ---- modules of torch.nn, and what torch.compile has made of a model

_part("torch.nn", "Module._compiled_call_impl", CLASSES, None)
_part("torch.nn", "Module._call_impl", CLASSES, None)
COMPILED_CALL = "_compiled_call_impl"  # what `nn.Module.__call__` looks up on an instance


def call_of(module: torch.nn.Module) -> Any:
    """The call of a module with its hooks, below what was compiled of it."""
    return getattr(module, "_call_impl", None) or module.__call__


def model_below(compiled: Any) -> Any:
    """What a compiled model or function was made of; None of one that is not compiled."""
    return getattr(compiled, "_orig_mod", None) or callable_below(compiled)


def callable_below(wrapped: Any) -> Any:
    """The function that torch has wrapped; None of one that is not."""
    return getattr(wrapped, "_torchdynamo_orig_callable", None)


def backend_below(backend: Any) -> Any:
    """The backend below one that Dynamo has wrapped around it; None of one that is not."""
    return getattr(backend, "compiler_fn", None) or getattr(backend, "_torchdynamo_orig_backend", None)


# ---- late: parts whose modules are dear to import (Dynamo, Inductor, sympy) are looked up when somebody first asks


def _lists_settings(list_options: Any) -> None:
    _expect("max_autotune" in list_options())


# name here -> (module, name, what is lost, in its place, a test)
_LATE: dict[str, tuple[Any, ...]] = {
    "counters": ("torch._dynamo.utils", "counters", BREAKS, defaultdict(Counter)),
    "dynamo_config": ("torch._dynamo", "config", LIMITS, None),
    "register_backend": ("torch._dynamo.backends.registry", "register_backend", BY_NAME, lambda *_, **__: None),
    "known_backends": ("torch._dynamo.backends.registry", "_COMPILER_FNS", "", {}),
    "free_unbacked_symbols": ("torch.fx.experimental.symbolic_shapes", "free_unbacked_symbols", REGIONS),
    "partition": ("torch._functorch.partitioners", "min_cut_rematerialization_partition", BODIES),
    "TracingContext": ("torch._guards", "TracingContext", BODIES),
    "tracing": ("torch._guards", "tracing", BODIES),
    "make_fx": ("torch.fx.experimental.proxy_tensor", "make_fx", BODIES),
    "ShapeEnv": ("torch.fx.experimental.symbolic_shapes", "ShapeEnv", SIZES),
    "DimDynamic": ("torch.fx.experimental.symbolic_shapes", "DimDynamic", SIZES),
    "SYMPY_INTERP": ("torch.fx.experimental.symbolic_shapes", "SYMPY_INTERP", SIZES),
    "sympy_printer": ("torch.utils._sympy.printers", "PythonPrinter", SIZES),
    "constant_source": ("torch._dynamo.source", "ConstantSource", SIZES),
    "rename_node": ("torch.fx", "Node._rename", BODIES),
    "aot_eager": ("torch._dynamo.backends.debugging", "aot_eager", AOT_EAGER, None),
    "compile_fx": ("torch._inductor.compile_fx", "compile_fx", INDUCTOR, None),
    "compile_fx_inner": ("torch._inductor.compile_fx", "compile_fx_inner", INDUCTOR, None),
    "inductor_config": ("torch._inductor", "config", INDUCTOR, None),
    "list_mode_options": ("torch._inductor", "list_mode_options", MODES, lambda mode: {}),
    "list_options": ("torch._inductor", "list_options", SETTINGS, None, _lists_settings),
    "select_decomp_table": ("torch._inductor.decomposition", "select_decomp_table", INDUCTOR, None),
    "get_cpp_compiler": ("torch._inductor.cpp_builder", "get_cpp_compiler", COMPILER, lambda: ""),
    "InvalidCxxCompiler": ("torch._inductor.exc", "InvalidCxxCompiler", COMPILER, RuntimeError),
    "CppCodeCache": ("torch._inductor.codecache", "CppCodeCache", KERNELS, None),
    "hash_of_triton": ("torch._inductor.codecache", "triton_key", "", None),
    "VecISA": ("torch._inductor.cpu_vec_isa", "VecISA", "", None),
    "flags_of_cpu": ("torch._inductor.cpu_vec_isa", "x86_isa_checker", "", list),
    "known_isas": ("torch._inductor.cpu_vec_isa", "supported_vec_isa_list", "", []),
    "valid_isas": ("torch._inductor.cpu_vec_isa", "valid_vec_isa_list", "", None),
    "SettingOfAThread": ("torch.utils._config_module", "ContextVar", "", None),
    "while_loop": ("torch._higher_order_ops.while_loop", "while_loop_op", EXPORTS),
    "compiling_inside": ("torch._higher_order_ops.utils", "setup_compilation_env", EXPORTS),
    "without_modes": ("torch.utils._python_dispatch", "_disable_current_modes", EXPORTS),
    "default_store": ("torch.distributed.distributed_c10d", "_get_default_store", RANKS, lambda: None),
    "inductor_cache_dir": ("torch._inductor.runtime.cache_dir_utils", "cache_dir", FOLDERS, tempfile.gettempdir),
}
NEEDED = tuple(name for name, feature in _FEATURE.items() if feature == REGIONS) + ("free_unbacked_symbols",)


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = functools.partial(_part, key=name)(*_LATE[name])
    return found


# ---- CUDA: a build without it has none of these, and loses nothing by that

_CUDA = torch.version.cuda is not None
# Without them a capture that failed leaves its memory pool behind.
end_allocate_to_pool = _part("torch._C", "_cuda_endAllocateToPool", POOLS if _CUDA else "")
release_pool = _part("torch._C", "_cuda_releasePool", POOLS if _CUDA else "")
# Without it nothing is captured: cuBLAS would go on working in the memory of a graph.
clear_workspaces = _part("torch._C", "_cuda_clearCublasWorkspaces", CAPTURES if _CUDA else "")


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


def compile_lock() -> Any:
    """The lock that Dynamo compiles under; None where there is no Dynamo yet, which is not imported for it."""
    return getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", None)
