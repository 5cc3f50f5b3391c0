"""The weights of the type-II operator M on a GPU: formulas of multisecant.py, one program a sample, float64, no host.

With k = n steps, and matrices that lie in memory by rows, so that every product is a sum of outer products of rows:

    Q = R^T        back substitution, row by row from the last: g_a = sum_i Q[i, a] s_i
    H = G Q        |g_a|^2 = sum_c H[c, a] Q[c, a];  T[p, c] = (Q[c, p + 1] - Q[c, p]) / |s_p|, and the same of H is (T G)^T
    K = T G T^T + ridge = U^T U,  U^T Z = E,  U Y = Z,  V = -Y^T T

All loops end at the sample's own n.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_shared import through


@triton.jit
def inverse_length(G_ptr, p, n, skip, LD: tl.constexpr):
    """1 / |s_p| of pairs that count; 0 of the others. p: numbers of pairs."""
    exists = (p < n - 1) & (p >= skip)
    square = tl.load(G_ptr + p * LD + p, mask=exists, other=0.0)
    return tl.where(square > 0.0, 1.0 / tl.sqrt(tl.where(square > 0.0, square, 1.0)), 0.0)


@triton.jit
def residuals_in_steps(Q_ptr, G_ptr, C_ptr, n, LDC, LD: tl.constexpr):
    """Q, n x n: zero below the diagonal."""
    j = tl.arange(0, LD)
    tl.store(Q_ptr + j, tl.where(j == 0, 1.0, 0.0).to(tl.float64))
    for back in tl.range(1, n):
        i = n - back
        kappa = tl.load(C_ptr + (i - 1) * LDC + i - 1).to(tl.float64)
        row = tl.where(j == i, 1.0, 0.0).to(tl.float64)
        for above in tl.range(i + 1, n, loop_unroll_factor=4):
            weight = kappa * tl.load(G_ptr + (i - 1) * LD + above)
            row -= weight * tl.load(Q_ptr + above * LD + j)
        row = row / (1.0 + kappa * tl.load(G_ptr + (i - 1) * LD + i))
        tl.store(Q_ptr + i * LD + j, row)
        tl.debug_barrier()


@triton.jit
def factorise(U_ptr, Z_ptr, Q_ptr, inverse_ptr, n, LD: tl.constexpr):
    """K = U^T U in place of K, and U^T Z = E, a row of both at a time: n - 1 rows."""
    j = tl.arange(0, LD)
    for p in tl.range(0, n - 1):
        u = tl.load(U_ptr + p * LD + j)
        inverse = tl.load(inverse_ptr + p)
        later = tl.load(Q_ptr + j * LD + p + 1, mask=j < n, other=0.0)
        z = (later - tl.load(Q_ptr + j * LD + p, mask=j < n, other=0.0) + tl.where(j == p, 1.0, 0.0)) * inverse
        for q in tl.range(0, p, loop_unroll_factor=4):
            weight = tl.load(U_ptr + q * LD + p)
            u -= weight * tl.load(U_ptr + q * LD + j)
            z -= weight * tl.load(Z_ptr + q * LD + j)
        pivot = 1.0 / tl.sqrt(tl.sum(tl.where(j == p, u, 0.0), axis=0))  # NaN where K is not positive: V is cleared then
        tl.store(U_ptr + p * LD + j, tl.where(j >= p, u * pivot, 0.0))
        tl.store(Z_ptr + p * LD + j, z * pivot)
        tl.debug_barrier()


@triton.jit
def solve_back(U_ptr, Z_ptr, n, LD: tl.constexpr):
    """U Y = Z, in place of Z."""
    j = tl.arange(0, LD)
    for back in tl.range(1, n):
        p = n - 1 - back
        y = tl.load(Z_ptr + p * LD + j)
        for q in tl.range(p + 1, n - 1, loop_unroll_factor=4):
            y -= tl.load(U_ptr + p * LD + q) * tl.load(Z_ptr + q * LD + j)
        tl.store(Z_ptr + p * LD + j, y / tl.load(U_ptr + p * LD + p))
        tl.debug_barrier()


@triton.jit(do_not_specialize=["B", "SLABS", "skip"])
def weights(
    part_ptr, C_ptr, n_ptr, own_n_ptr, V_ptr, work_ptr, table_ptr, B, SLABS, LDC, LDV, skip,
    M: tl.constexpr, LD: tl.constexpr, INDIRECT: tl.constexpr,
):  # fmt: skip
    """V (B, M + 1, LDV) from the partial Gram matrices part (B, SLABS, LD, LD) of n steps; n is copied to own_n. INDIRECT: C and
    n stand in the table. Grid (programs,): each works on every programs-th sample, with work (programs, 3 LD + 2, LD) float64."""
    if INDIRECT:
        C_ptr = through(C_ptr, table_ptr, 1)
        n_ptr = through(n_ptr, table_ptr, 2)
    i = tl.arange(0, LD)
    tile = i[:, None] * LD + i[None, :]
    first = tl.program_id(0).to(tl.int64)
    G_ptr = work_ptr + first * (3 * LD + 2) * LD  # then K and U
    Q_ptr = G_ptr + LD * LD
    H_ptr = Q_ptr + LD * LD  # then Z and Y
    inverse_ptr = H_ptr + LD * LD
    norm_ptr = inverse_ptr + LD
    for turn in tl.range(0, tl.cdiv(B - tl.program_id(0), tl.num_programs(0))):
        b = first + turn * tl.num_programs(0)
        n = tl.load(n_ptr + b)
        tl.store(own_n_ptr + b, n)
        stored = (i[:, None] < n) & (i[None, :] < n)
        G = tl.zeros((LD, LD), tl.float64)
        for slab in tl.range(0, SLABS):
            G += tl.load(part_ptr + (b * SLABS + slab) * LD * LD + tile, mask=stored, other=0.0).to(tl.float64)
        tl.debug_barrier()  # the last sample's readers are done
        tl.store(G_ptr + tile, G)
        tl.store(Q_ptr + tile, tl.zeros((LD, LD), tl.float64))
        tl.debug_barrier()
        inverse = inverse_length(G_ptr, i, n, skip, LD)
        tl.store(inverse_ptr + i, inverse)
        residuals_in_steps(Q_ptr, G_ptr, C_ptr + b * M * LDC, n, LDC, LD)
        tl.debug_barrier()
        H = tl.zeros((LD, LD), tl.float64)
        for c in tl.range(0, n):
            H += tl.load(G_ptr + c * LD + i)[:, None] * tl.load(Q_ptr + c * LD + i)[None, :]
        tl.store(H_ptr + tile, H)
        squares = tl.sum(H * tl.load(Q_ptr + tile), axis=0)
        tl.store(norm_ptr + i, tl.sqrt(tl.where(squares > 0.0, squares, 0.0)))
        tl.debug_barrier()
        K = tl.zeros((LD, LD), tl.float64)
        pair = i < n - 1
        for c in tl.range(0, n):
            h = tl.load(H_ptr + c * LD + i + 1, mask=pair, other=0.0) - tl.load(H_ptr + c * LD + i, mask=pair, other=0.0)
            t = tl.load(Q_ptr + c * LD + i + 1, mask=pair, other=0.0) - tl.load(Q_ptr + c * LD + i, mask=pair, other=0.0)
            K += (h * inverse)[:, None] * (t * inverse)[None, :]
        far = tl.maximum(tl.load(norm_ptr + i), tl.load(norm_ptr + i + 1, mask=pair, other=0.0))
        far = tl.where(inverse > 0.0, far, 0.0)
        far = far / tl.maximum(tl.max(far, axis=0), 2.2250738585072014e-308)
        diagonal = tl.sum(tl.where(i[:, None] == i[None, :], K, 0.0), axis=0)
        ridge = tl.where(inverse > 0.0, tl.maximum(diagonal, 1.0) * (0.03 + 3.0 * far), 1.0)  # RIDGE, RIDGE_FAR
        tl.debug_barrier()
        tl.store(G_ptr + tile, K + tl.where(i[:, None] == i[None, :], ridge[None, :], 0.0))
        tl.debug_barrier()
        factorise(G_ptr, H_ptr, Q_ptr, inverse_ptr, n, LD)
        solve_back(G_ptr, H_ptr, n, LD)
        V = tl.zeros((LD, LD), tl.float64)
        for p in tl.range(0, n - 1):
            later = tl.load(Q_ptr + i * LD + p + 1, mask=i < n, other=0.0)
            t = (later - tl.load(Q_ptr + i * LD + p, mask=i < n, other=0.0)) * tl.load(inverse_ptr + p)
            V -= tl.load(H_ptr + p * LD + i)[:, None] * t[None, :]
        bad = tl.sum(tl.sum(tl.where(stored & ((V - V) != 0.0), 1, 0), axis=1), axis=0)
        V = tl.where(bad > 0, 0.0, V)
        tl.store(V_ptr + (b * (M + 1) + i[:, None]) * LDV + i[None, :], V.to(V_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["S_address", "C_address", "n_address"])
def addresses(table_ptr, S_address, C_address, n_address):
    """Where a captured backward finds the factors of its forward. Grid (1,)."""
    tl.store(table_ptr, S_address.to(tl.int64))
    tl.store(table_ptr + 1, C_address.to(tl.int64))
    tl.store(table_ptr + 2, n_address.to(tl.int64))
