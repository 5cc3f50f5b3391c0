"""The adjoint iteration for a GPU: what lies between two vector-Jacobian products, in three launches and those of M.

    residual   r(w) = q + J^T w - w and partial sums of its square           grid (B, slabs)
    judge      norms, the batch's verdict, and each sample's                 one program
    extend     one more pair of the basis, x and r; the next trial if M = I   grid (B,)

The mathematics, signs and guards are those of aten.py; every sample has its own basis. No value goes to the host: `judge` says
in `act` what `extend` has to do for a sample (1: keep w as the best trial, 2: go back to the best trial). This file has no
imports of its own package, so that tests can load it a second time for Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

RUNNING = tl.constexpr(0)
CONVERGED = tl.constexpr(1)
FLOOR = tl.constexpr(2)
MAX_ITER = tl.constexpr(3)
NONFINITE = tl.constexpr(4)


@triton.jit
def _finite(x):
    return (x - x) == 0.0


@triton.jit
def residual(q_ptr, jw_ptr, w_ptr, rt_ptr, part_ptr, D, SLAB, BD: tl.constexpr, ACC: tl.constexpr):
    """part (B, slabs)."""
    b = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    d = tl.arange(0, BD)
    acc = tl.zeros((BD,), ACC)
    for d0 in tl.range(lo, hi, BD):
        o = b * D + d0 + d
        m = d0 + d < hi
        r = tl.load(q_ptr + o, mask=m, other=0.0).to(ACC) + tl.load(jw_ptr + o, mask=m, other=0.0).to(ACC)
        r -= tl.load(w_ptr + o, mask=m, other=0.0).to(ACC)
        tl.store(rt_ptr + o, r, mask=m)
        acc += r * r
    tl.store(part_ptr + b * tl.num_programs(1) + slab, tl.sum(acc, axis=0))


@triton.jit
def judge(
    part_ptr, norms_ptr, batch_norm_ptr, residuals_ptr, batch_ptr, best_ptr, mark_ptr, stall_ptr, count_ptr, done_ptr, act_ptr,
    B, PARTS, tol, floor, max_iter, BB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program. A sample whose cotangent is zero counts as solved. Once the batch's residual is at most `tol`, all stop."""
    i = tl.arange(0, BB)
    total = tl.zeros((BB,), ACC)
    for b0 in tl.range(0, B, BB):
        m = b0 + i < B
        square = tl.zeros((BB,), ACC)
        for p in tl.range(0, PARTS):
            square += tl.load(part_ptr + (b0 + i) * PARTS + p, mask=m, other=0.0)
        norm = tl.load(norms_ptr + b0 + i, mask=m, other=0.0).to(ACC)
        some = norm > 0.0
        square = tl.where(some, square, 0.0)
        tl.store(residuals_ptr + b0 + i, tl.sqrt(square) / tl.where(some, norm, 1.0), mask=m)
        total += square
    tl.debug_barrier()
    whole = tl.load(batch_norm_ptr).to(ACC)
    batch = tl.sqrt(tl.sum(total, axis=0)) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(batch_ptr, batch)
    solved = tl.where(batch <= tol, 1, 0)
    for b0 in tl.range(0, B, BB):
        m = b0 + i < B
        stop = tl.load(residuals_ptr + b0 + i, mask=m, other=0.0)
        best = tl.load(best_ptr + b0 + i, mask=m, other=0.0)
        mark = tl.load(mark_ptr + b0 + i, mask=m, other=0.0)
        stall = tl.load(stall_ptr + b0 + i, mask=m, other=0)
        count = tl.load(count_ptr + b0 + i, mask=m, other=0) + 1
        done = tl.load(done_ptr + b0 + i, mask=m, other=CONVERGED)
        # Integers: the interpreter spreads a comparison of floats over a block as floats, which take no `&`.
        finite = tl.where(_finite(stop), 1, 0)
        improved = tl.where((finite != 0) & (stop < best), 1, 0)
        best = tl.where(improved != 0, stop, best)
        below = tl.where((best < floor) & (floor > 0.0), 1, 0)
        gained = tl.where((below != 0) & (best < mark * 0.9), 1, 0)
        mark = tl.where(gained != 0, best, mark)
        stall = tl.where((gained != 0) | (below == 0), 0, stall + 1)
        code = tl.where(count >= max_iter, MAX_ITER, RUNNING)
        code = tl.where((below != 0) & (stall >= 5), FLOOR, code)
        code = tl.where((stop <= tol) | (solved != 0), CONVERGED, code)
        code = tl.where((finite != 0) | (solved != 0), code, NONFINITE)
        was = m & (done == RUNNING)
        act = tl.where(code == NONFINITE, 2, improved)
        tl.store(best_ptr + b0 + i, best, mask=was)
        tl.store(mark_ptr + b0 + i, mark, mask=was)
        tl.store(stall_ptr + b0 + i, stall, mask=was)
        tl.store(count_ptr + b0 + i, count, mask=was)
        tl.store(done_ptr + b0 + i, code, mask=was)
        tl.store(act_ptr + b0 + i, tl.where(was, act, 0), mask=m)


@triton.jit
def _dots(y_ptr, rows_ptr, k, D, ROW, BM: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr):
    """rows_j . y for k rows."""
    i = tl.arange(0, BM)
    d = tl.arange(0, BD)
    acc = tl.zeros((BM, BD), ACC)
    for d0 in tl.range(0, D, BD, num_stages=STAGES):
        o = d0 + d
        m = o < D
        y = tl.load(y_ptr + o, mask=m, other=0.0).to(ACC)
        mask = (i[:, None] < k) & m[None, :]
        acc += tl.load(rows_ptr + i[:, None] * ROW + o[None, :], mask=mask, other=0.0).to(ACC) * y[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def _orthogonal(y, rows_ptr, h_ptr, k, o, m, ROW, ACC: tl.constexpr):
    for j in tl.range(0, k, loop_unroll_factor=4):
        y -= tl.load(h_ptr + j) * tl.load(rows_ptr + j * ROW + o, mask=m, other=0.0).to(ACC)
    return y


@triton.jit
def extend(
    x_ptr, r_ptr, w_ptr, rt_ptr, basis_ptr, best_w_ptr, n_ptr, done_ptr, act_ptr, h_ptr, D, ROW, tiny,
    M: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BD2: tl.constexpr, STAGES: tl.constexpr, IDENTITY: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One sample: grid (B,). basis (B, 2, M, ROW): images, directions. h (B, 2 BM) is scratch."""
    b = tl.program_id(0).to(tl.int64)
    act = tl.load(act_ptr + b)
    done = tl.load(done_ptr + b)
    x_ptr += b * D
    r_ptr += b * D
    w_ptr += b * D
    rt_ptr += b * D
    best_w_ptr += b * D
    d = tl.arange(0, BD2)
    if act != 0:
        for d0 in tl.range(0, D, BD2):
            o = d0 + d
            m = o < D
            w = tl.load(w_ptr + o, mask=m, other=0.0)
            kept = tl.load(best_w_ptr + o, mask=m, other=0.0)
            tl.store(best_w_ptr + o, w, mask=m & (act == 1))
            tl.store(w_ptr + o, kept, mask=m & (act == 2))
    if done != RUNNING:
        return
    k = tl.load(n_ptr + b)
    k = tl.where(k < M, k, 0)  # a full basis is dropped, x and r stay
    images = basis_ptr + b * 2 * M * ROW
    directions = images + M * ROW
    y_ptr = images + k * ROW
    z_ptr = directions + k * ROW
    h_ptr += b * 2 * BM
    i = tl.arange(0, BM)
    acc = tl.zeros((BD2,), ACC)
    for d0 in tl.range(0, D, BD2):
        o = d0 + d
        m = o < D
        y = tl.load(r_ptr + o, mask=m, other=0.0).to(ACC) - tl.load(rt_ptr + o, mask=m, other=0.0).to(ACC)
        z = tl.load(w_ptr + o, mask=m, other=0.0).to(ACC) - tl.load(x_ptr + o, mask=m, other=0.0).to(ACC)
        tl.store(y_ptr + o, y, mask=m)
        tl.store(z_ptr + o, z, mask=m)
        acc += y * y
    before = tl.sum(acc, axis=0)
    total = tl.zeros((BM,), ACC)
    for _ in tl.static_range(2):  # classical Gram-Schmidt, twice
        tl.debug_barrier()
        h = _dots(y_ptr, images, k, D, ROW, BM, BD, STAGES, ACC)
        total += h
        tl.store(h_ptr + i, h)
        tl.debug_barrier()
        for d0 in tl.range(0, D, BD2):
            o = d0 + d
            m = o < D
            y = _orthogonal(tl.load(y_ptr + o, mask=m, other=0.0).to(ACC), images, h_ptr, k, o, m, ROW, ACC)
            tl.store(y_ptr + o, y, mask=m)
    tl.store(h_ptr + BM + i, total)
    tl.debug_barrier()
    acc = tl.zeros((BD2,), ACC)
    acc_r = tl.zeros((BD2,), ACC)
    for d0 in tl.range(0, D, BD2):
        o = d0 + d
        m = o < D
        y = tl.load(y_ptr + o, mask=m, other=0.0).to(ACC)
        acc += y * y
        acc_r += y * tl.load(r_ptr + o, mask=m, other=0.0).to(ACC)
    square = tl.sum(acc, axis=0)
    along = tl.sum(acc_r, axis=0)
    fresh = tl.where((square > tiny * tiny * before) & _finite(1.0 / square) & _finite(along), 1, 0)
    inverse = 1.0 / tl.sqrt(tl.where(fresh != 0, square, 1.0))
    alpha = along * inverse
    for d0 in tl.range(0, D, BD2):
        o = d0 + d
        m = o < D
        x = tl.load(x_ptr + o, mask=m, other=0.0).to(ACC)
        r = tl.load(r_ptr + o, mask=m, other=0.0).to(ACC)
        if fresh != 0:
            y = tl.load(y_ptr + o, mask=m, other=0.0).to(ACC) * inverse
            z = tl.load(z_ptr + o, mask=m, other=0.0).to(ACC)
            z = _orthogonal(z, directions, h_ptr + BM, k, o, m, ROW, ACC) * inverse
            tl.store(y_ptr + o, y, mask=m)
            tl.store(z_ptr + o, z, mask=m)
            x += alpha * z
            r -= alpha * y
        else:  # nothing new: begin again where the residual is known
            x = tl.load(w_ptr + o, mask=m, other=0.0).to(ACC)
            r = tl.load(rt_ptr + o, mask=m, other=0.0).to(ACC)
        tl.store(x_ptr + o, x, mask=m)
        tl.store(r_ptr + o, r, mask=m)
        if IDENTITY:
            tl.store(w_ptr + o, x + r, mask=m)
    tl.store(n_ptr + b, tl.where(fresh != 0, k + 1, 0))
