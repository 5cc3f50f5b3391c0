"""The Broyden step for a GPU. The mathematics, signs and guards are those of aten.py; shapes and names those of state.py.

Two forms. `step_fused`: one program a sample, one launch an iteration. `dots` and `combine`: a row is split over programs,
two launches; partial sums are added in a fixed order, without atomics, so that repeats are bitwise equal.

Both read a row of f and z twice, its n steps twice, and write one step, z and the best iterate: 2n + 8 words an element.
Every sample has its own number of steps; programs of samples that have stopped return at once. No value goes to the host.

In a captured graph (INDIRECT) what a solve leaves to its caller is addressed through a table that `start` writes: S, C, the best
iterate, and what `finish` says of each sample are new tensors in every solve. As the body of a WHILE node (COND) the last launch
of an iteration decides about the next one: in the fused form the samples vote (`triton_shared.vote`), in the split form `dots`
ends the loop and `combine` keeps it going while a sample runs.

`mark_ptr` is a matrix (2, padded(B)): the marks, and behind them the ceilings.

GIVEN says what `f_ptr` is: 0, the body at z; 1, the residual g itself, of which `norm_ptr` (B,) has the relative norm to stop on;
2, what is moved by in the place of g, the squares of |g| and |f| to judge by being in `norm_ptr` (2, padded(B)).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_shared import CONVERGED, MAX_ITER, NONFINITE, RUNNING, padded, set_conditional, through, vote
from .triton_parts import coefficients, freeze, judge, move, products, steps_after, store_row

ADDRESSES = ["S_address", "C_address", "best_z_address", "ints_address", "residual_address", "solve_info_address"]


@triton.jit(do_not_specialize=ADDRESSES)
def start(
    z0_ptr, z_ptr, best_z_ptr, n_ptr, best_ptr, mark_ptr, stall_ptr, count_ptr, done_ptr, table_ptr,
    S_address, C_address, best_z_address, ints_address, residual_address, solve_info_address,
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
        tl.store(mark_ptr + padded(tl.num_programs(0)) + b, float("inf"))
        if TABLE:
            if b == 0:
                tl.store(table_ptr, S_address.to(tl.int64))
                tl.store(table_ptr + 1, C_address.to(tl.int64))
                tl.store(table_ptr + 2, best_z_address.to(tl.int64))
                tl.store(table_ptr + 3, ints_address.to(tl.int64))
                tl.store(table_ptr + 4, residual_address.to(tl.int64))
                tl.store(table_ptr + 5, solve_info_address.to(tl.int64))
    d = tl.arange(0, BD)
    lo = tl.program_id(1) * SLAB
    hi = tl.minimum(lo + SLAB, D)
    for d0 in tl.range(lo, hi, BD):
        o = d0 + d
        z = tl.load(z0_ptr + b * D + o, mask=o < hi, other=0.0)
        tl.store(z_ptr + b * D + o, z, mask=o < hi)
        tl.store(best_z_ptr + b * D + o, z, mask=o < hi)


@triton.jit(do_not_specialize=["B"])
def summarise(done_ptr, count_ptr, out_ptr, B, BB: tl.constexpr):
    """For the host to read: samples that still run, that stopped short of their tolerance, the largest number of evaluations,
    and those that stopped short in all calls with this `out`. Grid (1,)."""
    i = tl.arange(0, BB)
    running = tl.zeros((BB,), tl.int32)
    missed = tl.zeros((BB,), tl.int32)
    most = tl.zeros((BB,), tl.int32)
    for b0 in tl.range(0, B, BB):
        done = tl.load(done_ptr + b0 + i, mask=b0 + i < B, other=CONVERGED)
        running += tl.where(done == RUNNING, 1, 0)
        missed += tl.where((done == MAX_ITER) | (done == NONFINITE), 1, 0)
        most = tl.maximum(most, tl.load(count_ptr + b0 + i, mask=b0 + i < B, other=0))
    in_all = tl.load(out_ptr + 3)
    tl.debug_barrier()
    tl.store(out_ptr, tl.sum(running, axis=0))
    tl.store(out_ptr + 1, tl.sum(missed, axis=0))
    tl.store(out_ptr + 3, in_all + tl.sum(missed, axis=0))
    tl.store(out_ptr + 2, tl.max(most, axis=0))


@triton.jit(do_not_specialize=["B"])
def finish(n_ptr, best_ptr, count_ptr, done_ptr, solve_info_ptr, table_ptr, B, BB: tl.constexpr):
    """What a captured solve says of each sample, into the new tensors whose addresses are in the table: ints (3, padded(B)) of
    steps, evaluations and codes; residual (B,); solve_info (B, 3) of residual, evaluations and codes. Grid (cdiv(B, BB),)."""
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    m = b < B
    ints = through(n_ptr, table_ptr, 3)
    residual = through(best_ptr, table_ptr, 4)
    solve_info = through(solve_info_ptr, table_ptr, 5)
    count = tl.load(count_ptr + b, mask=m)
    best = tl.load(best_ptr + b, mask=m)
    tl.store(ints + b, tl.load(n_ptr + b, mask=m), mask=m)
    tl.store(ints + padded(B) + b, count, mask=m)
    done = tl.load(done_ptr + b, mask=m)
    tl.store(ints + 2 * padded(B) + b, done, mask=m)
    tl.store(residual + b, best, mask=m)
    tl.store(solve_info + 3 * b, best.to(tl.float32), mask=m)
    tl.store(solve_info + 3 * b + 1, count.to(tl.float32), mask=m)
    tl.store(solve_info + 3 * b + 2, done.to(tl.float32), mask=m)


@triton.jit(do_not_specialize=["max_iter"])
def step_fused(
    z_ptr, f_ptr, norm_ptr, S_ptr, C_ptr, n_ptr, best_ptr, mark_ptr, stall_ptr, count_ptr, done_ptr, best_z_ptr, y_ptr,
    table_ptr, handle_ptr, ticket_ptr, D, ROW, LD, tol, floor, eta, max_iter,
    M: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BD2: tl.constexpr, STAGES: tl.constexpr,
    RELATIVE: tl.constexpr, GIVEN: tl.constexpr, OBSERVE: tl.constexpr, INDIRECT: tl.constexpr, COND: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One iteration of one sample: grid (B,). y (B, 3 BM + 2): the dot products, then the weights."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + b) != RUNNING:
        if COND:
            vote(handle_ptr, ticket_ptr, False)
        return
    if INDIRECT:
        S_ptr = through(S_ptr, table_ptr, 0)
        C_ptr = through(C_ptr, table_ptr, 1)
        best_z_ptr = through(best_z_ptr, table_ptr, 2)
    n = tl.load(n_ptr + b)
    i = tl.arange(0, BM)
    z_ptr += b * D
    f_ptr += b * D
    best_z_ptr += b * D
    S_ptr += b * (M + 1) * ROW
    C_ptr += b * M * LD
    y_ptr += b * (3 * BM + 2)
    products(y_ptr, z_ptr, f_ptr, S_ptr, n, 0, D, ROW, GIVEN, BM, BD, STAGES, ACC)
    tl.debug_barrier()
    a = tl.load(y_ptr + i, mask=i < n, other=0.0)
    r = tl.load(y_ptr + BM + i, mask=i < n, other=0.0)
    gg = tl.load(y_ptr + 2 * BM)
    ff = tl.load(y_ptr + 2 * BM + 1)
    if GIVEN == 2:
        gg = tl.load(norm_ptr + b)
        ff = tl.load(norm_ptr + padded(tl.num_programs(0)) + b)
    code = RUNNING
    improved = 0 * n
    if OBSERVE:
        count = tl.load(count_ptr + b) + 1
        norm = tl.load(norm_ptr + b) if GIVEN == 1 else gg
        ceiling_ptr = mark_ptr + padded(tl.num_programs(0))
        code, best, mark, ceiling, stall, improved, lost = judge(
            gg, ff, norm, tl.load(best_ptr + b), tl.load(mark_ptr + b), tl.load(ceiling_ptr + b), tl.load(stall_ptr + b), count,
            tol, floor, max_iter, RELATIVE, GIVEN,
        )  # fmt: skip
        # Every warp has read the counters for itself; none may see what one of them writes now, or they would part ways.
        tl.debug_barrier()
        tl.store(best_ptr + b, best)
        tl.store(mark_ptr + b, mark)
        tl.store(ceiling_ptr + b, ceiling)
        tl.store(stall_ptr + b, stall)
        tl.store(count_ptr + b, count)
        tl.store(done_ptr + b, code)
        tl.store(n_ptr + b, steps_after(code, n, M))
        if code != RUNNING:
            if COND:
                vote(handle_ptr, ticket_ptr, False)
            freeze(z_ptr, f_ptr, best_z_ptr, code == NONFINITE, lost, improved, 0, D, GIVEN, BD2)
            return
    else:
        tl.debug_barrier()
        tl.store(n_ptr + b, steps_after(code, n, M))
    if COND:
        vote(handle_ptr, ticket_ptr, True)
    weights_ptr = y_ptr + 2 * BM + 2
    scale, kappa, row = coefficients(a, r, y_ptr + BM, weights_ptr, C_ptr, n, eta, LD, BM)
    tl.debug_barrier()  # the weights go through memory to be read one number at a time
    store_row(C_ptr, row, kappa, n, LD, M, BM)
    move(z_ptr, f_ptr, S_ptr, best_z_ptr, weights_ptr, scale, n, improved, 0, D, ROW, M, GIVEN, BD2, ACC, 8)


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
        tl.store(floats_ptr + b * 3 + 2, tl.load(mark_ptr + padded(tl.num_programs(0)) + b))
        if n == 2:
            tl.store(C_ptr + b * M * LD, tl.load(pending_ptr + b))
    if done != RUNNING:
        return
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    part_ptr += (b * tl.num_programs(1) + slab) * (2 * BM + 2)
    S_ptr += b * (M + 1) * ROW
    products(part_ptr, z_ptr + b * D, f_ptr + b * D, S_ptr, n, lo, hi, ROW, GIVEN, BM, BD, STAGES, ACC)


@triton.jit(do_not_specialize=["PARTS", "max_iter"])
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
        best_z_ptr = through(best_z_ptr, table_ptr, 2)
    n = tl.load(ints_ptr + b * 4)
    i = tl.arange(0, BM)
    q = tl.arange(0, BP)
    P = part_ptr + b * PARTS * (2 * BM + 2) + q[:, None] * (2 * BM + 2)
    some = (q[:, None] < PARTS) & (i[None, :] < n)
    a = tl.sum(tl.load(P + i[None, :], mask=some, other=0.0), axis=0)
    r = tl.sum(tl.load(P + BM + i[None, :], mask=some, other=0.0), axis=0)
    Q = part_ptr + b * PARTS * (2 * BM + 2) + q * (2 * BM + 2) + 2 * BM
    if GIVEN == 2:  # as sums like those below: with scalar loads ptxas of Triton 3.6 takes 40 registers and spills
        gg = tl.sum(tl.load(norm_ptr + b + 0 * q, mask=q < 1, other=0.0), axis=0)
        ff = tl.sum(tl.load(norm_ptr + padded(tl.num_programs(0)) + b + 0 * q, mask=q < 1, other=0.0), axis=0)
    else:
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
        norm = tl.load(norm_ptr + b) if GIVEN == 1 else gg
        code, best, mark, ceiling, stall, improved, lost = judge(
            gg, ff, norm, tl.load(floats_ptr + b * 3), tl.load(floats_ptr + b * 3 + 1), tl.load(floats_ptr + b * 3 + 2),
            tl.load(ints_ptr + b * 4 + 1), count, tol, floor, max_iter, RELATIVE, GIVEN,
        )  # fmt: skip
        if slab == 0:
            tl.store(best_ptr + b, best)
            tl.store(mark_ptr + b, mark)
            tl.store(mark_ptr + padded(tl.num_programs(0)) + b, ceiling)
            tl.store(stall_ptr + b, stall)
            tl.store(count_ptr + b, count)
            tl.store(done_ptr + b, code)
            tl.store(n_ptr + b, steps_after(code, n, M))
        if code != RUNNING:
            freeze(z_ptr, f_ptr, best_z_ptr, code == NONFINITE, lost, improved, lo, hi, GIVEN, BD)
            return
    elif slab == 0:
        tl.store(n_ptr + b, steps_after(code, n, M))
    tl.store(y_ptr + BM + i, r)
    tl.debug_barrier()
    scale, kappa, row = coefficients(a, r, y_ptr + BM, y_ptr, C_ptr, n, eta, LD, BM)
    tl.debug_barrier()
    if slab == 0:
        if COND:
            set_conditional(handle_ptr, 1)
        # The other programs of this sample read rows below n - 1 of C. Row 0 is written again after a restart, under their
        # eyes: it is one number, kappa, and waits for the next `dots`, which reads no C.
        if (n >= 2) & (n <= M):
            store_row(C_ptr, row, kappa, n, LD, M, BM)
        else:
            tl.store(pending_ptr + b, kappa)
    move(z_ptr, f_ptr, S_ptr, best_z_ptr, y_ptr, scale, n, improved, lo, hi, ROW, M, GIVEN, BD, ACC, 4)
