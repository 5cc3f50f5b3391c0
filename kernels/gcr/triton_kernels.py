"""The adjoint iteration for a GPU: three launches between two VJPs, mathematics of state.py, per-sample decisions as in aten.py.

`project`: r(w) = q + J^T w - w, its norms, and the products of the new image y = r - r(w) with the basis. `extend`: is the batch
done, does the sample go on, and if so y and z = w - x orthogonalised and stored, with the products that the next trial needs.
`advance`: x, r and the next trial w = x + M r. Rows are split over programs; partial sums are added in a fixed order.

Images are kept as they come, beside their squared norms nu and Gram matrix G: with c = G^-1 h in two Jacobi steps from h / nu,
orthogonalising is as good as classical Gram-Schmidt done twice, and reads the images once less (the row of G that the last image
adds comes with the next products). Norm and coefficient of the new image are sums over the image itself, not differences.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..iteration.triton_stopping import classify
from ..triton_shared import CONVERGED, NONFINITE, RUNNING, finite, set_conditional, through


@triton.jit
def _true_residual(q_ptr, jw_ptr, w_ptr, o, m, ACC: tl.constexpr):
    q = tl.load(q_ptr + o, mask=m, other=0.0).to(ACC)
    jw = tl.load(jw_ptr + o, mask=m, other=0.0).to(ACC)
    return q + jw - tl.load(w_ptr + o, mask=m, other=0.0).to(ACC)


@triton.jit
def _project(out_ptr, q_ptr, jw_ptr, w_ptr, r_ptr, rt_ptr, images_ptr, k, lo, hi, ROW, STRIDE: tl.constexpr, BK: tl.constexpr,
             BD: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """r(w) into rt; h_j = image_j . y (at 0), g_j = image_j . image_{k-1} (at STRIDE); returns |r(w)|^2 and |y|^2."""
    i = tl.arange(0, BK)
    d = tl.arange(0, BD)
    acc_h = tl.zeros((BK, BD), ACC)
    acc_g = tl.zeros((BK, BD), ACC)
    acc_t = tl.zeros((BD,), ACC)
    acc_y = tl.zeros((BD,), ACC)
    for d0 in tl.range(lo, hi, BD, num_stages=STAGES):
        o = d0 + d
        m = o < hi
        t = _true_residual(q_ptr, jw_ptr, w_ptr, o, m, ACC)
        y = tl.load(r_ptr + o, mask=m, other=0.0).to(ACC) - t
        last = tl.load(images_ptr + (k - 1) * ROW + o, mask=m & (k > 0), other=0.0).to(ACC)
        image = tl.load(images_ptr + i[:, None] * ROW + o[None, :], mask=(i[:, None] < k) & m[None, :], other=0.0).to(ACC)
        acc_h += image * y[None, :]
        acc_g += image * last[None, :]
        acc_t += t * t
        acc_y += y * y
        tl.store(rt_ptr + o, t, mask=m)
    tl.store(out_ptr + i, tl.sum(acc_h, axis=1))
    tl.store(out_ptr + STRIDE + i, tl.sum(acc_g, axis=1))
    return tl.sum(acc_t, axis=0), tl.sum(acc_y, axis=0)


@triton.jit
def project(
    q_ptr, jw_ptr, w_ptr, r_ptr, rt_ptr, images_ptr, n_ptr, best_ptr, mark_ptr, stall_ptr, count_ptr, done_ptr, part_ptr,
    squares_ptr, ints_ptr, floats_ptr, handle_ptr, D, ROW, SLAB,
    M: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, COND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (B, slabs). part (B, slabs, 2 BK), squares (2, B, slabs). The first slab copies the sample's counters, which
    `extend` changes while its programs read the copies. Samples that have stopped keep w, hence r(w) and its norm too."""
    b = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    slabs = tl.num_programs(1)
    k = tl.load(n_ptr + b)
    k = tl.where(k < M, k, 0)  # a full basis is dropped; x and r stay
    if COND:
        if (b == 0) & (slab == 0):
            set_conditional(handle_ptr, 0)
    if slab == 0:
        tl.store(ints_ptr + b * 4, k)
        tl.store(ints_ptr + b * 4 + 1, tl.load(stall_ptr + b))
        tl.store(ints_ptr + b * 4 + 2, tl.load(count_ptr + b))
        tl.store(ints_ptr + b * 4 + 3, tl.load(done_ptr + b))
        tl.store(floats_ptr + b * 2, tl.load(best_ptr + b))
        tl.store(floats_ptr + b * 2 + 1, tl.load(mark_ptr + b))
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    row = b * D
    images_ptr += b * 2 * M * ROW
    out = part_ptr + (b * slabs + slab) * 2 * BK
    if BK <= 16:
        t, y = _project(out, q_ptr + row, jw_ptr + row, w_ptr + row, r_ptr + row, rt_ptr + row, images_ptr, k, lo, hi, ROW, BK,
                        BK, BD, STAGES, ACC)  # fmt: skip
        tl.store(squares_ptr + b * slabs + slab, t)
        tl.store(squares_ptr + (tl.num_programs(0) + b) * slabs + slab, y)
    else:
        if k <= 16:
            t, y = _project(out, q_ptr + row, jw_ptr + row, w_ptr + row, r_ptr + row, rt_ptr + row, images_ptr, k, lo, hi, ROW,
                            BK, 16, BD * BK // 16, STAGES, ACC)  # fmt: skip
            tl.store(squares_ptr + b * slabs + slab, t)
            tl.store(squares_ptr + (tl.num_programs(0) + b) * slabs + slab, y)
        else:
            t, y = _project(out, q_ptr + row, jw_ptr + row, w_ptr + row, r_ptr + row, rt_ptr + row, images_ptr, k, lo, hi, ROW,
                            BK, BK, BD, STAGES, ACC)  # fmt: skip
            tl.store(squares_ptr + b * slabs + slab, t)
            tl.store(squares_ptr + (tl.num_programs(0) + b) * slabs + slab, y)


@triton.jit
def _sum(values_ptr, count, BB: tl.constexpr, ACC: tl.constexpr):
    """The sum of `count` numbers in memory, in a fixed order."""
    i = tl.arange(0, BB)
    total = tl.zeros((BB,), ACC)
    for at in tl.range(0, count, BB):
        total += tl.load(values_ptr + at + i, mask=at + i < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _coefficients(h, g, c_ptr, G_ptr, nu_ptr, k, M: tl.constexpr, BK: tl.constexpr):
    """c = G^-1 h by two Jacobi steps, to memory. h: [BK] products with y; g: [BK] the row of G that the last image adds, which
    is not in memory yet."""
    i = tl.arange(0, BK)
    j = tl.arange(0, 16)
    own = tl.sum(tl.where(i == k - 1, g, 0.0), axis=0)
    nu = tl.where(i == k - 1, own, tl.load(nu_ptr + i, mask=i < k - 1, other=1.0))
    first = tl.where(i < k, h / nu, 0.0)
    tl.store(c_ptr + i, first)
    tl.debug_barrier()
    top = tl.sum(tl.where(i == k - 1, first, 0.0), axis=0)
    product = tl.where(i < k - 1, g * top, 0.0)  # the last image's column
    for j0 in tl.range(0, k - 1, 16):
        at = j0 + j
        G = tl.load(G_ptr + at[:, None] * M + i[None, :], mask=(at[:, None] < k - 1) & (i[None, :] < k - 1), other=0.0)
        product += tl.sum(G * tl.load(c_ptr + at, mask=at < k - 1, other=0.0)[:, None], axis=0)  # G is symmetric
    corner = tl.sum(tl.where(i < k, g * first, 0.0), axis=0)
    product = tl.where(i == k - 1, corner, product)
    second = tl.where(i < k, first + (h - product) / nu, 0.0)
    tl.debug_barrier()
    tl.store(c_ptr + i, second)
    tl.debug_barrier()


@triton.jit
def _steps(out_ptr, S_ptr, r_ptr, y_ptr, n, lo, hi, ROW, FIRST: tl.constexpr, STRIDE: tl.constexpr, BM: tl.constexpr,
           BD: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """s_j . r (at 0) and s_j . y (at STRIDE) of the forward solve's steps."""
    i = tl.arange(0, BM)
    d = tl.arange(0, BD)
    acc_r = tl.zeros((BM, BD), ACC)
    acc_y = tl.zeros((BM, BD), ACC)
    for d0 in tl.range(lo, hi, BD, num_stages=STAGES):
        o = d0 + d
        m = o < hi
        s = tl.load(S_ptr + i[:, None] * ROW + o[None, :], mask=(i[:, None] < n) & m[None, :], other=0.0).to(ACC)
        acc_r += s * tl.load(r_ptr + o, mask=m, other=0.0).to(ACC)[None, :]
        if not FIRST:
            acc_y += s * tl.load(y_ptr + o, mask=m, other=0.0).to(ACC)[None, :]
    tl.store(out_ptr + i, tl.sum(acc_r, axis=1))
    tl.store(out_ptr + STRIDE + i, tl.sum(acc_y, axis=1))


@triton.jit
def _steps_by_number(out_ptr, S_ptr, r_ptr, y_ptr, n, lo, hi, ROW, FIRST: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
                     STAGES: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    if BM <= 16:
        _steps(out_ptr, S_ptr, r_ptr, y_ptr, n, lo, hi, ROW, FIRST, BM, BM, BD, STAGES, ACC)
    else:
        if n <= 16:
            _steps(out_ptr, S_ptr, r_ptr, y_ptr, n, lo, hi, ROW, FIRST, BM, 16, BD * BM // 16, STAGES, ACC)
        else:
            _steps(out_ptr, S_ptr, r_ptr, y_ptr, n, lo, hi, ROW, FIRST, BM, BM, BD, STAGES, ACC)


@triton.jit
def begin(
    q_ptr, S_ptr, steps_ptr, table_ptr, part_ptr, D, ROW, SLAB,
    SLOTS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, INDIRECT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """s_j . q, for the first trial w = M q: grid (B, slabs)."""
    b = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    if INDIRECT:
        S_ptr = through(S_ptr, table_ptr, 0)
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    out = part_ptr + (b * tl.num_programs(1) + slab) * (2 * BM + 2)
    S_ptr += b * SLOTS * ROW
    _steps_by_number(out, S_ptr, q_ptr + b * D, q_ptr, tl.load(steps_ptr + b), lo, hi, ROW, True, BM, BD, STAGES, ACC)


@triton.jit(do_not_specialize=["max_iter"])
def extend(
    w_ptr, x_ptr, r_ptr, rt_ptr, images_ptr, S_ptr, steps_ptr, table_ptr, norms_ptr, batch_norm_ptr, best_ptr, mark_ptr,
    stall_ptr, count_ptr, done_ptr, best_w_ptr, relative_ptr, batch_ptr, G_ptr, nu_ptr, c_ptr, part_ptr, squares_ptr, part2_ptr,
    ints_ptr, floats_ptr, handle_ptr, D, ROW, S_ROW, SLAB, tol, floor, max_iter,
    M: tl.constexpr, SLOTS: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
    BD2: tl.constexpr, STAGES: tl.constexpr, INDIRECT: tl.constexpr, COND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (B, slabs). part2 (B, slabs, 2 BM + 2): s_j . r, s_j . y, |y|^2, y . r; batch (2,): residual, 1 where that ends it."""
    b = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    slabs = tl.num_programs(1)
    total = _sum(squares_ptr, tl.num_programs(0) * slabs, 256, ACC)
    own = _sum(squares_ptr + b * slabs, slabs, BP, ACC)
    norm = tl.load(norms_ptr + b)
    batch_norm = tl.load(batch_norm_ptr)
    relative = tl.where(norm > 0.0, tl.sqrt(own) / norm, 0.0)
    batch = tl.where(batch_norm == 0.0, 0.0, tl.sqrt(total) / batch_norm)
    ended = tl.where(batch <= tol, 1, 0)
    was = tl.load(ints_ptr + b * 4 + 3)
    k = tl.load(ints_ptr + b * 4)
    count = tl.load(ints_ptr + b * 4 + 2) + 1
    code, best, mark, stall, improved = classify(
        relative, tl.load(floats_ptr + b * 2), tl.load(floats_ptr + b * 2 + 1), tl.load(ints_ptr + b * 4 + 1), count, tol, floor,
        floor, max_iter, 1, 1,
    )  # fmt: skip
    code = tl.where(ended != 0, CONVERGED, code)
    improved = tl.where(ended != 0, 0, improved)
    if slab == 0:
        tl.store(relative_ptr + b, relative)
        if b == 0:
            tl.store(batch_ptr, batch)
            tl.store(batch_ptr + 1, ended.to(ACC))
        if was == RUNNING:
            tl.store(count_ptr + b, count)
            tl.store(done_ptr + b, code)
            if ended == 0:
                tl.store(best_ptr + b, best)
                tl.store(mark_ptr + b, mark)
                tl.store(stall_ptr + b, stall)
    if was != RUNNING:
        return
    d = tl.arange(0, BD2)
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    w_ptr += b * D
    x_ptr += b * D
    r_ptr += b * D
    rt_ptr += b * D
    best_w_ptr += b * D
    if code != RUNNING:
        failed = tl.where(code == NONFINITE, 1, 0)
        for d0 in tl.range(lo, hi, BD2):
            o = d0 + d
            m = o < hi
            w = tl.load(w_ptr + o, mask=m, other=0.0)
            kept = tl.load(best_w_ptr + o, mask=m & (failed != 0), other=0.0)
            tl.store(best_w_ptr + o, w, mask=m & (improved != 0))
            tl.store(w_ptr + o, kept, mask=m & (failed != 0))
        return
    if COND:
        if slab == 0:
            set_conditional(handle_ptr, 1)
    i = tl.arange(0, BK)
    p = tl.arange(0, BP)
    P = part_ptr + b * slabs * 2 * BK + p[:, None] * 2 * BK + i[None, :]
    some = (p[:, None] < slabs) & (i[None, :] < k)
    h = tl.sum(tl.load(P, mask=some, other=0.0), axis=0)
    g = tl.sum(tl.load(P + BK, mask=some, other=0.0), axis=0)
    c_ptr += (b * slabs + slab) * BK
    G_ptr += b * M * M
    nu_ptr += b * M
    _coefficients(h, g, c_ptr, G_ptr, nu_ptr, k, M, BK)
    if (slab == 0) & (k > 0):
        # The other programs of this sample read rows and columns below k - 1 only.
        tl.store(G_ptr + (k - 1) * M + i, g, mask=i < k)
        tl.store(G_ptr + i * M + k - 1, g, mask=i < k)
        tl.store(nu_ptr + k - 1, tl.sum(tl.where(i == k - 1, g, 0.0), axis=0))
    images_ptr += b * 2 * M * ROW
    directions_ptr = images_ptr + M * ROW
    acc_y = tl.zeros((BD2,), ACC)
    acc_r = tl.zeros((BD2,), ACC)
    for d0 in tl.range(lo, hi, BD2):
        o = d0 + d
        m = o < hi
        w = tl.load(w_ptr + o, mask=m, other=0.0).to(ACC)
        r = tl.load(r_ptr + o, mask=m, other=0.0).to(ACC)
        y = r - tl.load(rt_ptr + o, mask=m, other=0.0).to(ACC)
        z = w - tl.load(x_ptr + o, mask=m, other=0.0).to(ACC)
        for j in tl.range(0, k, loop_unroll_factor=4):
            c = tl.load(c_ptr + j)
            y -= c * tl.load(images_ptr + j * ROW + o, mask=m, other=0.0).to(ACC)
            z -= c * tl.load(directions_ptr + j * ROW + o, mask=m, other=0.0).to(ACC)
        tl.store(best_w_ptr + o, w, mask=m & (improved != 0))
        tl.store(images_ptr + k * ROW + o, y, mask=m)
        tl.store(directions_ptr + k * ROW + o, z, mask=m)
        acc_y += y * y
        acc_r += y * r
    out = part2_ptr + (b * slabs + slab) * (2 * BM + 2)
    tl.store(out + 2 * BM, tl.sum(acc_y, axis=0))
    tl.store(out + 2 * BM + 1, tl.sum(acc_r, axis=0))
    tl.debug_barrier()
    if INDIRECT:
        S_ptr = through(S_ptr, table_ptr, 0)
    S_ptr += b * SLOTS * S_ROW
    y_ptr = images_ptr + k * ROW
    _steps_by_number(out, S_ptr, r_ptr, y_ptr, tl.load(steps_ptr + b), lo, hi, S_ROW, False, BM, BD, STAGES, ACC)


@triton.jit
def advance(
    w_ptr, x_ptr, r_ptr, rt_ptr, images_ptr, S_ptr, V_ptr, steps_ptr, table_ptr, n_ptr, done_ptr, d_ptr, part2_ptr, squares_ptr,
    ints_ptr, D, ROW, S_ROW, LDV, SLAB, tiny,
    M: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
    FIRST: tl.constexpr, INDIRECT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x += alpha z, r -= alpha y, w = x + M r; a sample whose image says nothing new begins again at x = w. Grid (B, slabs).
    FIRST: w = M r, with r = q and x = 0."""
    b = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    slabs = tl.num_programs(1)
    if tl.load(done_ptr + b) != RUNNING:
        return
    i = tl.arange(0, BM)
    j = tl.arange(0, 16)
    p = tl.arange(0, BP)
    n = tl.load(steps_ptr + b)
    P = part2_ptr + b * slabs * (2 * BM + 2) + p[:, None] * (2 * BM + 2) + i[None, :]
    some = (p[:, None] < slabs) & (i[None, :] < n)
    s_r = tl.sum(tl.load(P, mask=some, other=0.0), axis=0)
    k = 0
    alpha = tl.sum(tl.zeros((1,), ACC), axis=0)
    fresh = 0 * n + 1  # an integer: the interpreter's comparisons of floats take no `&`
    if not FIRST:
        k = tl.load(ints_ptr + b * 4)
        Q = part2_ptr + b * slabs * (2 * BM + 2) + p * (2 * BM + 2) + 2 * BM
        square = tl.sum(tl.load(Q, mask=p < slabs, other=0.0), axis=0)
        along = tl.sum(tl.load(Q + 1, mask=p < slabs, other=0.0), axis=0)
        before = _sum(squares_ptr + (tl.num_programs(0) + b) * slabs, slabs, BP, ACC)
        fresh = tl.where(square > tiny * tiny * before, fresh, 0)
        fresh = tl.where(finite(1.0 / square), fresh, 0)
        fresh = tl.where(finite(along), fresh, 0)
        alpha = tl.where(fresh != 0, along / square, 0.0)
        s_r -= alpha * tl.sum(tl.load(P + BM, mask=some, other=0.0), axis=0)
        if slab == 0:
            tl.store(n_ptr + b, tl.where(fresh != 0, k + 1, 0))
    # d = V^T (S r), 16 rows of V at a time
    d_ptr += (b * slabs + slab) * 2 * BM
    tl.store(d_ptr + BM + i, s_r)
    tl.debug_barrier()
    if INDIRECT:
        S_ptr = through(S_ptr, table_ptr, 0)
    V_ptr += b * SLOTS * LDV
    weights = tl.zeros((BM,), ACC)
    for j0 in tl.range(0, n, 16):
        at = j0 + j
        V = tl.load(V_ptr + at[:, None] * LDV + i[None, :], mask=(at[:, None] < n) & (i[None, :] < n), other=0.0).to(ACC)
        weights += tl.sum(V * tl.load(d_ptr + BM + at, mask=at < n, other=0.0)[:, None], axis=0)
    tl.store(d_ptr + i, weights)
    tl.debug_barrier()
    S_ptr += b * SLOTS * S_ROW
    images_ptr += b * 2 * M * ROW
    directions_ptr = images_ptr + M * ROW
    d = tl.arange(0, BD)
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    row = b * D
    use = tl.where(fresh != 0, n, 0)
    for d0 in tl.range(lo, hi, BD):
        o = d0 + d
        m = o < hi
        x = tl.load(x_ptr + row + o, mask=m, other=0.0).to(ACC)
        r = tl.load(r_ptr + row + o, mask=m, other=0.0).to(ACC)
        if not FIRST:
            y = tl.load(images_ptr + k * ROW + o, mask=m & (fresh != 0), other=0.0).to(ACC)
            z = tl.load(directions_ptr + k * ROW + o, mask=m & (fresh != 0), other=0.0).to(ACC)
            again_x = tl.load(w_ptr + row + o, mask=m & (fresh == 0), other=0.0).to(ACC)
            again_r = tl.load(rt_ptr + row + o, mask=m & (fresh == 0), other=0.0).to(ACC)
            x = tl.where(fresh != 0, x + alpha * z, again_x)
            r = tl.where(fresh != 0, r - alpha * y, again_r)
            tl.store(x_ptr + row + o, x, mask=m)
            tl.store(r_ptr + row + o, r, mask=m)
        w = x + r
        for at in tl.range(0, use, loop_unroll_factor=4):
            w += tl.load(d_ptr + at) * tl.load(S_ptr + at * S_ROW + o, mask=m, other=0.0).to(ACC)
        tl.store(w_ptr + row + o, w, mask=m)
