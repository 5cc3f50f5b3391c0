"""The Broyden step for a GPU. The mathematics, signs and guards are those of aten.py; shapes and names those of state.py.

Two forms. `step_fused`: one program a sample, one launch an iteration. `dots` and `combine`: a row is split over programs,
two launches; partial sums are added in a fixed order, without atomics, so that repeats are bitwise equal.

Both read a row of f and z twice, its n steps twice, and write one step, z and the best iterate: 2n + 8 words an element.
Every sample has its own number of steps; programs of samples that have stopped return at once. No value goes to the host.

In a captured graph (INDIRECT) the addresses of S and C come from a table that `start` writes: they are new tensors in every
solve. As the body of a WHILE node (COND) the last launch of an iteration keeps the loop going while a sample runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_shared import CONVERGED, FLOOR, MAX_ITER, NONFINITE, RUNNING, finite, set_conditional, through

# NORM_EPS 1e-9, STALL_GAIN 0.9, STALL_PATIENCE 5, FALL 0.1 (0.5 at a floor above 0.1) and RESOLUTION 2 of state.py stand below
# as numbers: the interpreter multiplies no constexpr. `mark_ptr` is a matrix (2, B): the marks, and the ceilings.


@triton.jit
def _judge(
    gg, ff, norm, best, mark, ceiling, stall, count, tol, floor, max_iter, RELATIVE: tl.constexpr, GIVEN: tl.constexpr
):  # fmt: skip
    """What the residual at z means for one sample: status code, best, mark, ceiling, stall, whether z is the best so far, and
    whether it failed before any was finite."""
    stop = tl.sqrt(gg)
    threshold = floor + 0.0 * gg
    fallen = 1
    fallen_at_floor = 1
    if GIVEN:
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
    whole = finite(stop)
    # An integer: the interpreter spreads a comparison of floats over a block as floats, which take no `&`.
    improved = tl.where(whole & (stop < best), 1, 0)
    lost = tl.where(whole | finite(best), 0, 1)
    best = tl.where(improved != 0, stop, best)
    below = (best < threshold) & (floor > 0.0)
    gained = below & (best < mark * 0.9)
    mark = tl.where(gained, best, mark)
    stall = tl.where(gained | (below == 0), 0, stall + 1)
    code = tl.where(count >= max_iter, MAX_ITER, RUNNING)
    code = tl.where(below & (stall >= 5) & (fallen_at_floor != 0), FLOOR, code)
    code = tl.where((stop <= tol) & (fallen != 0), CONVERGED, code)
    code = tl.where(whole, code, NONFINITE)
    return code, best, mark, ceiling, stall, improved, lost


@triton.jit
def _coefficients(a, r, r_ptr, y_ptr, C_ptr, n, eta, LD, BM: tl.constexpr):
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
def _store_row(C_ptr, row, kappa, n, LD, M: tl.constexpr, BM: tl.constexpr):
    """Append a row to C; a full memory starts anew with one pair."""
    i = tl.arange(0, BM)
    full = n > M
    at = tl.where(full, 0, n - 1)
    row = tl.where(full, tl.where(i == 0, kappa, 0.0), row)
    tl.store(C_ptr + at * LD + i, row, mask=(i < LD) & (n > 0))


@triton.jit
def _residual(z_ptr, f_ptr, o, m, GIVEN: tl.constexpr, ACC: tl.constexpr):
    f = tl.load(f_ptr + o, mask=m, other=0.0).to(ACC)
    z = tl.load(z_ptr + o, mask=m, other=0.0).to(ACC)
    g = f
    if not GIVEN:
        g = f - z
    return g, f, z


@triton.jit
def _dots_tiled(out_ptr, z_ptr, f_ptr, S_ptr, n, lo, hi, ROW, GIVEN: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr,
                BD: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """`_dots` with tiles of BM rows."""
    i = tl.arange(0, BM)
    d = tl.arange(0, BD)
    acc_a = tl.zeros((BM, BD), ACC)
    acc_r = tl.zeros((BM, BD), ACC)
    acc_g = tl.zeros((BD,), ACC)
    acc_f = tl.zeros((BD,), ACC)
    for d0 in tl.range(lo, hi, BD, num_stages=STAGES):
        o = d0 + d
        m = o < hi
        g, f, z = _residual(z_ptr, f_ptr, o, m, GIVEN, ACC)
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
def _dots(out_ptr, z_ptr, f_ptr, S_ptr, n, lo, hi, ROW, GIVEN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
          STAGES: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """a_j = s_j . g (at 0), r_j = s_j . s_{n-1} (at BM), |g|^2 and |f|^2 (at 2 BM) over columns lo .. hi, from one read of the
    steps. Entries from n on are not written. The rows of a tile follow n, so that one launch serves every iteration."""
    if BM <= 16:
        _dots_tiled(out_ptr, z_ptr, f_ptr, S_ptr, n, lo, hi, ROW, GIVEN, BM, BM, BD, STAGES, ACC)
    else:
        if n <= 16:
            _dots_tiled(out_ptr, z_ptr, f_ptr, S_ptr, n, lo, hi, ROW, GIVEN, BM, 16, BD * BM // 16, STAGES, ACC)
        else:
            _dots_tiled(out_ptr, z_ptr, f_ptr, S_ptr, n, lo, hi, ROW, GIVEN, BM, BM, BD, STAGES, ACC)


@triton.jit
def _move(z_ptr, f_ptr, S_ptr, best_z_ptr, y_ptr, scale, n, improved, lo, hi, ROW, M: tl.constexpr, GIVEN: tl.constexpr,
          BD: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """p = scale (g + sum_j y_j s_{j+1}) into its slot, z += p, over columns lo .. hi; keep the best iterate; restart."""
    d = tl.arange(0, BD)
    full = n > M
    slot = tl.where(full, 1, n)
    for d0 in tl.range(lo, hi, BD):
        o = d0 + d
        m = o < hi
        p, f, z = _residual(z_ptr, f_ptr, o, m, GIVEN, ACC)
        for j in tl.range(0, n - 1, loop_unroll_factor=4):
            p += tl.load(y_ptr + j) * tl.load(S_ptr + (j + 1) * ROW + o, mask=m, other=0.0).to(ACC)
        p = (p * scale).to(S_ptr.dtype.element_ty)
        last = tl.load(S_ptr + M * ROW + o, mask=m & full, other=0.0)
        tl.store(best_z_ptr + o, z, mask=m & (improved != 0))
        tl.store(S_ptr + o, last, mask=m & full)
        tl.store(S_ptr + slot * ROW + o, p, mask=m)
        tl.store(z_ptr + o, z + p.to(ACC), mask=m)


@triton.jit
def _stop(z_ptr, f_ptr, best_z_ptr, failed, lost, improved, lo, hi, GIVEN: tl.constexpr, BD: tl.constexpr):
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
        if not GIVEN:
            f = tl.load(f_ptr + o, mask=m & (lost != 0), other=0.0).to(z.dtype)
            tl.store(best_z_ptr + o, f, mask=m & (lost != 0))


@triton.jit
def _steps_after(code, n, M: tl.constexpr):
    """Steps stored after this iteration: one more, two after a restart; a failed sample loses the one that led there."""
    moved = tl.where(n > M, 2, n + 1)
    return tl.where(code == RUNNING, moved, tl.where((code == NONFINITE) & (n > 0), n - 1, n))


@triton.jit(do_not_specialize=["S_address", "C_address"])
def start(
    z0_ptr, z_ptr, best_z_ptr, n_ptr, best_ptr, mark_ptr, stall_ptr, count_ptr, done_ptr, table_ptr, S_address, C_address,
    D, SLAB, BD: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """A new solve: no step stored, every sample at its row of z0, addresses in the table. Grid (B, slabs)."""
    b = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        tl.store(n_ptr + b, 0)
        tl.store(stall_ptr + b, 0)
        tl.store(count_ptr + b, 0)
        tl.store(done_ptr + b, RUNNING)
        tl.store(best_ptr + b, float("inf"))
        tl.store(mark_ptr + b, float("inf"))
        tl.store(mark_ptr + tl.num_programs(0) + b, float("inf"))
        if TABLE:
            if b == 0:
                tl.store(table_ptr, S_address.to(tl.int64))
                tl.store(table_ptr + 1, C_address.to(tl.int64))
    d = tl.arange(0, BD)
    lo = tl.program_id(1) * SLAB
    hi = tl.minimum(lo + SLAB, D)
    for d0 in tl.range(lo, hi, BD):
        o = d0 + d
        z = tl.load(z0_ptr + b * D + o, mask=o < hi, other=0.0)
        tl.store(z_ptr + b * D + o, z, mask=o < hi)
        tl.store(best_z_ptr + b * D + o, z, mask=o < hi)


@triton.jit
def summarise(done_ptr, count_ptr, out_ptr, B, BB: tl.constexpr):
    """For the host to read: samples that still run, that stopped short of their tolerance, and the largest number of
    evaluations. Grid (1,)."""
    i = tl.arange(0, BB)
    running = tl.zeros((BB,), tl.int32)
    missed = tl.zeros((BB,), tl.int32)
    most = tl.zeros((BB,), tl.int32)
    for b0 in tl.range(0, B, BB):
        done = tl.load(done_ptr + b0 + i, mask=b0 + i < B, other=CONVERGED)
        running += tl.where(done == RUNNING, 1, 0)
        missed += tl.where((done == MAX_ITER) | (done == NONFINITE), 1, 0)
        most = tl.maximum(most, tl.load(count_ptr + b0 + i, mask=b0 + i < B, other=0))
    tl.store(out_ptr, tl.sum(running, axis=0))
    tl.store(out_ptr + 1, tl.sum(missed, axis=0))
    tl.store(out_ptr + 2, tl.max(most, axis=0))


@triton.jit
def stop_looping(handle_ptr):
    """Ahead of `step_fused` in the body of a WHILE node: the loop ends unless a sample says otherwise. Grid (1,)."""
    set_conditional(handle_ptr, 0)


@triton.jit
def step_fused(
    z_ptr, f_ptr, norm_ptr, S_ptr, C_ptr, n_ptr, best_ptr, mark_ptr, stall_ptr, count_ptr, done_ptr, best_z_ptr, y_ptr,
    table_ptr, handle_ptr, D, ROW, LD, tol, floor, eta, max_iter,
    M: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BD2: tl.constexpr, STAGES: tl.constexpr,
    RELATIVE: tl.constexpr, GIVEN: tl.constexpr, OBSERVE: tl.constexpr, INDIRECT: tl.constexpr, COND: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One iteration of one sample: grid (B,). y (B, 3 BM + 2): the dot products, then the weights."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + b) != RUNNING:
        return
    if INDIRECT:
        S_ptr = through(S_ptr, table_ptr, 0)
        C_ptr = through(C_ptr, table_ptr, 1)
    n = tl.load(n_ptr + b)
    i = tl.arange(0, BM)
    z_ptr += b * D
    f_ptr += b * D
    best_z_ptr += b * D
    S_ptr += b * (M + 1) * ROW
    C_ptr += b * M * LD
    y_ptr += b * (3 * BM + 2)
    _dots(y_ptr, z_ptr, f_ptr, S_ptr, n, 0, D, ROW, GIVEN, BM, BD, STAGES, ACC)
    tl.debug_barrier()
    a = tl.load(y_ptr + i, mask=i < n, other=0.0)
    r = tl.load(y_ptr + BM + i, mask=i < n, other=0.0)
    gg = tl.load(y_ptr + 2 * BM)
    ff = tl.load(y_ptr + 2 * BM + 1)
    code = RUNNING
    improved = 0 * n
    if OBSERVE:
        count = tl.load(count_ptr + b) + 1
        norm = tl.load(norm_ptr + b) if GIVEN else gg
        ceiling_ptr = mark_ptr + tl.num_programs(0)
        code, best, mark, ceiling, stall, improved, lost = _judge(
            gg, ff, norm, tl.load(best_ptr + b), tl.load(mark_ptr + b), tl.load(ceiling_ptr + b), tl.load(stall_ptr + b), count,
            tol, floor, max_iter, RELATIVE, GIVEN,
        )  # fmt: skip
        tl.store(best_ptr + b, best)
        tl.store(mark_ptr + b, mark)
        tl.store(ceiling_ptr + b, ceiling)
        tl.store(stall_ptr + b, stall)
        tl.store(count_ptr + b, count)
        tl.store(done_ptr + b, code)
        tl.store(n_ptr + b, _steps_after(code, n, M))
        if code != RUNNING:
            _stop(z_ptr, f_ptr, best_z_ptr, code == NONFINITE, lost, improved, 0, D, GIVEN, BD2)
            return
    else:
        tl.store(n_ptr + b, _steps_after(code, n, M))
    if COND:
        set_conditional(handle_ptr, 1)
    weights_ptr = y_ptr + 2 * BM + 2
    scale, kappa, row = _coefficients(a, r, y_ptr + BM, weights_ptr, C_ptr, n, eta, LD, BM)
    tl.debug_barrier()  # the weights go through memory to be read one number at a time
    _store_row(C_ptr, row, kappa, n, LD, M, BM)
    _move(z_ptr, f_ptr, S_ptr, best_z_ptr, weights_ptr, scale, n, improved, 0, D, ROW, M, GIVEN, BD2, ACC)


@triton.jit
def dots(
    z_ptr, f_ptr, S_ptr, C_ptr, n_ptr, best_ptr, mark_ptr, stall_ptr, count_ptr, done_ptr, part_ptr, ints_ptr, floats_ptr,
    pending_ptr, table_ptr, handle_ptr, D, ROW, LD, SLAB,
    M: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, GIVEN: tl.constexpr, INDIRECT: tl.constexpr,
    COND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial dot products of a slab of columns: grid (B, slabs). part (B, slabs, 2 BM + 2).

    The first slab also copies the sample's counters, which `combine` changes while its programs read the copies.
    """
    b = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    done = tl.load(done_ptr + b)
    n = tl.load(n_ptr + b)
    if INDIRECT:
        S_ptr = through(S_ptr, table_ptr, 0)
        C_ptr = through(C_ptr, table_ptr, 1)
    if COND:
        if (b == 0) & (slab == 0):
            set_conditional(handle_ptr, 0)
    if slab == 0:
        tl.store(ints_ptr + b * 4, n)
        tl.store(ints_ptr + b * 4 + 1, tl.load(stall_ptr + b))
        tl.store(ints_ptr + b * 4 + 2, tl.load(count_ptr + b))
        tl.store(ints_ptr + b * 4 + 3, done)
        tl.store(floats_ptr + b * 3, tl.load(best_ptr + b))
        tl.store(floats_ptr + b * 3 + 1, tl.load(mark_ptr + b))
        tl.store(floats_ptr + b * 3 + 2, tl.load(mark_ptr + tl.num_programs(0) + b))
        if n == 2:
            tl.store(C_ptr + b * M * LD, tl.load(pending_ptr + b))
    if done != RUNNING:
        return
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    part_ptr += (b * tl.num_programs(1) + slab) * (2 * BM + 2)
    S_ptr += b * (M + 1) * ROW
    _dots(part_ptr, z_ptr + b * D, f_ptr + b * D, S_ptr, n, lo, hi, ROW, GIVEN, BM, BD, STAGES, ACC)


@triton.jit
def combine(
    z_ptr, f_ptr, norm_ptr, S_ptr, C_ptr, n_ptr, best_ptr, mark_ptr, stall_ptr, count_ptr, done_ptr, best_z_ptr, y_ptr,
    part_ptr, ints_ptr, floats_ptr, pending_ptr, table_ptr, handle_ptr, D, ROW, LD, SLAB, PARTS, tol, floor, eta, max_iter,
    M: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
    RELATIVE: tl.constexpr, GIVEN: tl.constexpr, OBSERVE: tl.constexpr, INDIRECT: tl.constexpr, COND: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Reduce the partial sums, do the small algebra (each program for itself), update a slab of columns: grid (B, slabs)."""
    b = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    if tl.load(ints_ptr + b * 4 + 3) != RUNNING:
        return
    if INDIRECT:
        S_ptr = through(S_ptr, table_ptr, 0)
        C_ptr = through(C_ptr, table_ptr, 1)
    n = tl.load(ints_ptr + b * 4)
    i = tl.arange(0, BM)
    q = tl.arange(0, BP)
    P = part_ptr + b * PARTS * (2 * BM + 2) + q[:, None] * (2 * BM + 2)
    some = (q[:, None] < PARTS) & (i[None, :] < n)
    a = tl.sum(tl.load(P + i[None, :], mask=some, other=0.0), axis=0)
    r = tl.sum(tl.load(P + BM + i[None, :], mask=some, other=0.0), axis=0)
    Q = part_ptr + b * PARTS * (2 * BM + 2) + q * (2 * BM + 2) + 2 * BM
    gg = tl.sum(tl.load(Q, mask=q < PARTS, other=0.0), axis=0)
    ff = tl.sum(tl.load(Q + 1, mask=q < PARTS, other=0.0), axis=0)
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    z_ptr += b * D
    f_ptr += b * D
    best_z_ptr += b * D
    S_ptr += b * (M + 1) * ROW
    C_ptr += b * M * LD
    y_ptr += (b * tl.num_programs(1) + slab) * 2 * BM
    code = RUNNING
    improved = 0 * n
    if OBSERVE:
        count = tl.load(ints_ptr + b * 4 + 2) + 1
        norm = tl.load(norm_ptr + b) if GIVEN else gg
        code, best, mark, ceiling, stall, improved, lost = _judge(
            gg, ff, norm, tl.load(floats_ptr + b * 3), tl.load(floats_ptr + b * 3 + 1), tl.load(floats_ptr + b * 3 + 2),
            tl.load(ints_ptr + b * 4 + 1), count, tol, floor, max_iter, RELATIVE, GIVEN,
        )  # fmt: skip
        if slab == 0:
            tl.store(best_ptr + b, best)
            tl.store(mark_ptr + b, mark)
            tl.store(mark_ptr + tl.num_programs(0) + b, ceiling)
            tl.store(stall_ptr + b, stall)
            tl.store(count_ptr + b, count)
            tl.store(done_ptr + b, code)
            tl.store(n_ptr + b, _steps_after(code, n, M))
        if code != RUNNING:
            _stop(z_ptr, f_ptr, best_z_ptr, code == NONFINITE, lost, improved, lo, hi, GIVEN, BD)
            return
    elif slab == 0:
        tl.store(n_ptr + b, _steps_after(code, n, M))
    tl.store(y_ptr + BM + i, r)
    tl.debug_barrier()
    scale, kappa, row = _coefficients(a, r, y_ptr + BM, y_ptr, C_ptr, n, eta, LD, BM)
    tl.debug_barrier()
    if slab == 0:
        if COND:
            set_conditional(handle_ptr, 1)
        # The other programs of this sample read rows below n - 1 of C. Row 0 is written again after a restart, under their
        # eyes: it is one number, kappa, and waits for the next `dots`, which reads no C.
        if (n >= 2) & (n <= M):
            _store_row(C_ptr, row, kappa, n, LD, M, BM)
        else:
            tl.store(pending_ptr + b, kappa)
    _move(z_ptr, f_ptr, S_ptr, best_z_ptr, y_ptr, scale, n, improved, lo, hi, ROW, M, GIVEN, BD, ACC)
