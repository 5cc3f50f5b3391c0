"""What the Broyden kernels are made of: device functions on one sample, inlined into the kernels of triton_kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..iteration.triton_stopping import classify
from ..triton_shared import NONFINITE, RUNNING, finite

# NORM_EPS 1e-9, FALL 0.1 (0.5 at a floor above 0.1) and RESOLUTION 2 of iteration/state.py stand below as numbers: the
# interpreter multiplies no constexpr.


@triton.jit
def judge(
    gg, ff, norm, best, mark, ceiling, stall, count, tol, floor, max_iter, RELATIVE: tl.constexpr, GIVEN: tl.constexpr
):  # fmt: skip
    """What the residual at z means for one sample: status code, best, mark, ceiling, stall, whether z is the best so far, and
    whether it failed before any was finite."""
    stop = tl.sqrt(gg)
    threshold = floor + 0.0 * gg
    fallen = 1
    fallen_at_floor = 1
    if GIVEN == 1:
        stop = norm
    else:
        scale = tl.sqrt(ff) + 1e-9
        fall = tl.where(floor > 0.1, 0.5, 0.1)
        start = tl.maximum(tl.maximum(stop, 2.0 * floor / fall * scale), 20.0 * tol * scale if RELATIVE else 10.0 * tol)
        ceiling = tl.where(count == 1, start, ceiling)
        known = tl.maximum(stop, (2.4e-7 if gg.dtype == tl.float32 else 4.5e-16) * scale)
        fallen = tl.where(known <= 0.1 * ceiling, 1, 0)
        fallen_at_floor = tl.where(known <= fall * ceiling, 1, 0)
        if RELATIVE:
            stop = stop / scale
        else:
            threshold = floor * scale
    code, best, mark, stall, improved = classify(
        stop, best, mark, stall, count, tol, floor, threshold, max_iter, fallen, fallen_at_floor
    )
    lost = tl.where(finite(stop) | finite(best), 0, 1)
    return code, best, mark, ceiling, stall, improved, lost


@triton.jit
def coefficients(a, r, r_ptr, y_ptr, C_ptr, n, eta, LD, BM: tl.constexpr):
    """The n x n algebra, 16 rows of C at a time: weights y of s_1 .. s_{n-1} to memory; 1 / denominator, kappa, and the new row
    of C. a, r: [BM]; r stands in memory too, to be read shifted by one."""
    i = tl.arange(0, BM)
    j = tl.arange(0, 16)
    row = tl.zeros_like(a)
    minus_tau = tl.sum(tl.where(i == n - 1, a, 0.0), axis=0)
    for j0 in tl.range(0, n - 1, 16):
        k = j0 + j
        C = tl.load(C_ptr + k[:, None] * LD + i[None, :], mask=(k[:, None] < n - 1) & (i[None, :] <= k[:, None]), other=0.0)
        shifted = tl.load(r_ptr + k + 1, mask=k < n - 1, other=0.0)  # r_{j+1}
        y = tl.sum(C * a[None, :], axis=1)
        tl.store(y_ptr + k, y, mask=k < n - 1)
        minus_tau += tl.sum(y * shifted, axis=0)
        row += tl.sum(C * shifted[:, None], axis=0)
    sigma = tl.sum(tl.where(i == n - 1, r, 0.0), axis=0)
    gamma = 1.0 - minus_tau / sigma
    damped = tl.abs(gamma) < eta
    denominator = tl.where(damped, tl.where(gamma >= 0.0, eta, -eta), gamma)
    kappa = tl.where(damped, (1.0 - denominator) / minus_tau, 1.0 / sigma)
    usable = finite(kappa / denominator) & (n > 0)
    denominator = tl.where(usable, denominator, 1.0)
    kappa = tl.where(usable, kappa, 0.0)
    row *= kappa
    row = tl.where(finite(row), row, 0.0)
    row = tl.where(i == n - 1, kappa, row)
    return 1.0 / denominator, kappa, row


@triton.jit
def store_row(C_ptr, row, kappa, n, LD, M: tl.constexpr, BM: tl.constexpr):
    """Append a row to C; a full memory starts anew with one pair."""
    i = tl.arange(0, BM)
    full = n > M
    at = tl.where(full, 0, n - 1)
    row = tl.where(full, tl.where(i == 0, kappa, 0.0), row)
    tl.store(C_ptr + at * LD + i, row, mask=(i < LD) & (n > 0))


@triton.jit
def residual(z_ptr, f_ptr, o, m, GIVEN: tl.constexpr, ACC: tl.constexpr):
    f = tl.load(f_ptr + o, mask=m, other=0.0).to(ACC)
    z = tl.load(z_ptr + o, mask=m, other=0.0).to(ACC)
    g = f
    if not GIVEN:
        g = f - z
    return g, f, z


@triton.jit
def products_tiled(out_ptr, z_ptr, f_ptr, S_ptr, n, lo, hi, ROW, GIVEN: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr,
                BD: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """`products` with tiles of BM rows."""
    i = tl.arange(0, BM)
    d = tl.arange(0, BD)
    acc_a = tl.zeros((BM, BD), ACC)
    acc_r = tl.zeros((BM, BD), ACC)
    acc_g = tl.zeros((BD,), ACC)
    acc_f = tl.zeros((BD,), ACC)
    for d0 in tl.range(lo, hi, BD, num_stages=STAGES):
        o = d0 + d
        m = o < hi
        g, f, _z = residual(z_ptr, f_ptr, o, m, GIVEN, ACC)
        last = tl.load(S_ptr + (n - 1) * ROW + o, mask=m & (n > 0), other=0.0).to(ACC)
        s = tl.load(S_ptr + i[:, None] * ROW + o[None, :], mask=(i[:, None] < n) & m[None, :], other=0.0).to(ACC)
        acc_a += s * g[None, :]
        acc_r += s * last[None, :]
        acc_g += g * g
        acc_f += f * f
    tl.store(out_ptr + i, tl.sum(acc_a, axis=1))
    tl.store(out_ptr + STRIDE + i, tl.sum(acc_r, axis=1))
    tl.store(out_ptr + 2 * STRIDE, tl.sum(acc_g, axis=0))
    tl.store(out_ptr + 2 * STRIDE + 1, tl.sum(acc_f, axis=0))


@triton.jit
def products(out_ptr, z_ptr, f_ptr, S_ptr, n, lo, hi, ROW, GIVEN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
          STAGES: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """a_j = s_j . g (at 0), r_j = s_j . s_{n-1} (at BM), |g|^2 and |f|^2 (at 2 BM) over columns lo .. hi, from one read of the
    steps. Entries from n on are not written. The rows of a tile follow n, so that one launch serves every iteration."""
    if BM <= 16:
        products_tiled(out_ptr, z_ptr, f_ptr, S_ptr, n, lo, hi, ROW, GIVEN, BM, BM, BD, STAGES, ACC)
    else:
        if n <= 16:
            products_tiled(out_ptr, z_ptr, f_ptr, S_ptr, n, lo, hi, ROW, GIVEN, BM, 16, BD * BM // 16, STAGES, ACC)
        else:
            products_tiled(out_ptr, z_ptr, f_ptr, S_ptr, n, lo, hi, ROW, GIVEN, BM, BM, BD, STAGES, ACC)


@triton.jit
def move(z_ptr, f_ptr, S_ptr, best_z_ptr, y_ptr, scale, n, improved, lo, hi, ROW, M: tl.constexpr, GIVEN: tl.constexpr,
          BD: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """p = scale (g + sum_j y_j s_{j+1}) into its slot, z += p, over columns lo .. hi; keep the best iterate; restart."""
    d = tl.arange(0, BD)
    full = n > M
    slot = tl.where(full, 1, n)
    for d0 in tl.range(lo, hi, BD):
        o = d0 + d
        m = o < hi
        p, _f, z = residual(z_ptr, f_ptr, o, m, GIVEN, ACC)
        for j in tl.range(0, n - 1, loop_unroll_factor=UNROLL):
            p += tl.load(y_ptr + j) * tl.load(S_ptr + (j + 1) * ROW + o, mask=m, other=0.0).to(ACC)
        p = (p * scale).to(S_ptr.dtype.element_ty)
        last = tl.load(S_ptr + M * ROW + o, mask=m & full, other=0.0)
        tl.store(best_z_ptr + o, z, mask=m & (improved != 0))
        tl.store(S_ptr + o, last, mask=m & full)
        tl.store(S_ptr + slot * ROW + o, p, mask=m)
        tl.store(z_ptr + o, z + p.to(ACC), mask=m)


@triton.jit
def freeze(z_ptr, f_ptr, best_z_ptr, failed, lost, improved, lo, hi, GIVEN: tl.constexpr, BD: tl.constexpr):
    """A sample stops: its best iterate is this one, or it failed and goes back to its best one; where none was finite, f is what
    it returns."""
    d = tl.arange(0, BD)
    for d0 in tl.range(lo, hi, BD):
        o = d0 + d
        m = o < hi
        z = tl.load(z_ptr + o, mask=m, other=0.0)
        kept = tl.load(best_z_ptr + o, mask=m & failed, other=0.0)
        tl.store(best_z_ptr + o, z, mask=m & (improved != 0))
        tl.store(z_ptr + o, kept, mask=m & failed)
        if GIVEN != 1:
            f = tl.load(f_ptr + o, mask=m & (lost != 0), other=0.0).to(z.dtype)
            tl.store(best_z_ptr + o, f, mask=m & (lost != 0))


@triton.jit
def steps_after(code, n, M: tl.constexpr):
    """Steps stored after this iteration: one more, two after a restart; a failed sample loses the one that led there."""
    moved = tl.where(n > M, 2, n + 1)
    return tl.where(code == RUNNING, moved, tl.where((code == NONFINITE) & (n > 0), n - 1, n))
