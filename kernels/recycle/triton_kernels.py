"""The two thin products of a shared inverse P = I - A^T Y for a GPU, the residual fused into them. Mathematics: shared.py.

`thin_weights` reads f and z and leaves c = (f - z) Y^T, with |f - z|^2 and |f|^2 of each sample; `thin_apply` writes
P (f - z) = f - z - c A, or f - c A = z + P (f - z). A row is split over programs; partial sums are added in a fixed order,
without atomics, so that repeats are bitwise equal. A program takes BB samples at a time, which share what it reads of Y and A.

From memory 5 words an element: f and z twice, the result once. Y and A, r / BB words an element each, come from a cache: they are
as large as r samples. Programs whose samples have all stopped return at once, and rows of stopped samples are neither read nor
written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_shared import CONVERGED, RUNNING, finite, padded


@triton.jit
def _running(done_ptr, b, B):
    """1 for samples that still run; 0 beyond the last one."""
    return tl.where(tl.load(done_ptr + b, mask=b < B, other=CONVERGED) == RUNNING, 1, 0)


@triton.jit(do_not_specialize=["B", "R"])
def thin_weights(
    f_ptr, z_ptr, Y_ptr, done_ptr, part_ptr, B, R, D, SLAB,
    BB: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, SQUARES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BB), slabs). part (B, slabs, BR + 2): y_k . (f - z), |f - z|^2, |f|^2 over a slab of columns; the latter two
    with SQUARES. Y (R, D); f (B, D) of any floating dtype."""
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    slab = tl.program_id(1)
    runs = _running(done_ptr, b, B)
    if tl.max(runs, axis=0) == 0:
        return
    i = tl.arange(0, BR)
    d = tl.arange(0, BD)
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    acc = tl.zeros((BB, BR, BD), ACC)
    acc_g = tl.zeros((BB, BD), ACC)
    acc_f = tl.zeros((BB, BD), ACC)
    for d0 in tl.range(lo, hi, BD, num_stages=STAGES):
        o = d0 + d
        at = b[:, None] * D + o[None, :]
        some = (runs[:, None] != 0) & (o[None, :] < hi)
        f = tl.load(f_ptr + at, mask=some, other=0.0).to(ACC)
        g = f - tl.load(z_ptr + at, mask=some, other=0.0).to(ACC)
        y = tl.load(Y_ptr + i[:, None] * D + o[None, :], mask=(i[:, None] < R) & (o[None, :] < hi), other=0.0).to(ACC)
        acc += g[:, None, :] * y[None, :, :]
        if SQUARES:
            acc_g += g * g
            acc_f += f * f
    out = part_ptr + (b * tl.num_programs(1) + slab) * (BR + 2)
    tl.store(out[:, None] + i[None, :], tl.sum(acc, axis=2), mask=runs[:, None] != 0)
    if SQUARES:
        tl.store(out + BR, tl.sum(acc_g, axis=1), mask=runs != 0)
        tl.store(out + BR + 1, tl.sum(acc_f, axis=1), mask=runs != 0)


@triton.jit(do_not_specialize=["B", "R", "PARTS"])
def thin_apply(
    f_ptr, z_ptr, A_ptr, done_ptr, part_ptr, c_ptr, squares_ptr, out_ptr, B, R, D, SLAB, PARTS,
    BB: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BB), slabs). out (B, D): f - c A; RESIDUAL: f - z - c A, and squares (2, padded(B)) of |f - z| and |f|. Then
    a sample whose residual is not finite gets f itself: it is going to be stopped there, and that is what it returns.
    c (programs, BB, BR): the weights, to be read one number a sample at a time. `out` may be f."""
    b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    slab = tl.program_id(1)
    runs = _running(done_ptr, b, B)
    if tl.max(runs, axis=0) == 0:
        return
    i = tl.arange(0, BR)
    p = tl.arange(0, BP)
    parts = part_ptr + (b[:, None] * PARTS + p[None, :]) * (BR + 2)
    there = (runs[:, None] != 0) & (p[None, :] < PARTS)
    c = tl.sum(tl.load(parts[:, :, None] + i[None, None, :], mask=there[:, :, None], other=0.0), axis=1)
    c_ptr += ((tl.program_id(0).to(tl.int64) * tl.num_programs(1) + slab) * BB + tl.arange(0, BB)) * BR
    tl.store(c_ptr[:, None] + i[None, :], c)
    whole = runs
    if RESIDUAL:
        gg = tl.sum(tl.load(parts + BR, mask=there, other=0.0), axis=1)
        whole = tl.where(finite(gg), 1, 0)
        if slab == 0:
            ff = tl.sum(tl.load(parts + BR + 1, mask=there, other=0.0), axis=1)
            tl.store(squares_ptr + b, gg, mask=runs != 0)
            tl.store(squares_ptr + padded(B) + b, ff, mask=runs != 0)
    tl.debug_barrier()
    d = tl.arange(0, BD)
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    for d0 in tl.range(lo, hi, BD):
        o = d0 + d
        at = b[:, None] * D + o[None, :]
        some = (runs[:, None] != 0) & (o[None, :] < hi)
        f = tl.load(f_ptr + at, mask=some, other=0.0).to(ACC)
        v = f
        if RESIDUAL:
            v = f - tl.load(z_ptr + at, mask=some, other=0.0).to(ACC)
        for k in tl.range(0, R, loop_unroll_factor=4):
            v -= tl.load(c_ptr + k)[:, None] * tl.load(A_ptr + k * D + o, mask=o < hi, other=0.0).to(ACC)[None, :]
        if RESIDUAL:
            v = tl.where(whole[:, None] != 0, v, f)
        tl.store(out_ptr + at, v, mask=some)
