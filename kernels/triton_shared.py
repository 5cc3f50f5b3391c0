"""What the Triton kernels of several operations share: status codes, CUDA-graph conditions, addresses from a table."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language import core

# The codes of broyden/state.py.
RUNNING = tl.constexpr(0)
CONVERGED = tl.constexpr(1)
FLOOR = tl.constexpr(2)
MAX_ITER = tl.constexpr(3)
NONFINITE = tl.constexpr(4)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@core.extern
def _set_graph_conditional(handle, value, _semantic=None):
    """The device function of CUDA graphs that decides whether a WHILE node goes round once more."""
    symbol = {(core.dtype("int64"), core.dtype("int32")): ("cudaGraphSetConditional", core.dtype("int32"))}
    return core.extern_elementwise("", "", [handle, value], symbol, is_pure=False, _semantic=_semantic)


@triton.jit
def set_conditional(handle_ptr, value):
    """Decide about the WHILE node whose handle, int64, lies at `handle_ptr`; in the interpreter, which has no graphs, that place
    itself holds the decision. A place for int32 is a flag that holds it, too: `set_from` passes it on."""
    if INTERPRETED or handle_ptr.dtype.element_ty == tl.int32:
        tl.store(handle_ptr, value)
    else:
        _set_graph_conditional(tl.load(handle_ptr), value)


@triton.jit
def vote(handle_ptr, ticket_ptr, RUNS: tl.constexpr):
    """The programs of a launch decide about the WHILE node together: it goes round once more while one of them says so.

    `ticket_ptr`: one int64, zero before the launch and after it: arrivals in its lower half, those that run in its upper half.
    Sums of integers, so the order of arrival is of no matter. Every program of a grid (B,) votes once.
    """
    before = tl.atomic_add(ticket_ptr, 4294967297 if RUNS else 1, sem="relaxed")
    if (before & 4294967295) == tl.num_programs(0) - 1:
        others = before >> 32
        set_conditional(handle_ptr, 1 if RUNS else tl.where(others > 0, 1, 0))
        tl.store(ticket_ptr, 0)


@triton.jit
def padded(B):
    """Counters of B samples lie in rows of this many elements, so that each row begins at a multiple of 128 bytes: Triton
    specialises on alignment, and another batch size would compile the kernels again. `padded` of tiles.py."""
    return (B + 31) // 32 * 32


@triton.jit
def set_from(handle_ptr, flag_ptr):
    """Decide about a WHILE node as a flag says: handle_ptr int64, flag_ptr int32. In the body of the loop itself."""
    set_conditional(handle_ptr, tl.load(flag_ptr))


@triton.jit
def through(pointer, table_ptr, at: tl.constexpr):
    """The address in slot `at` of the table, as a pointer of the type of `pointer`. Buffers start at multiples of 16 bytes."""
    return tl.multiple_of(tl.load(table_ptr + at).to(tl.pointer_type(pointer.dtype.element_ty)), 16)


@triton.jit
def finite(x):
    return (x - x) == 0.0
