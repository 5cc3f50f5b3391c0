"""Products with the stored steps for a GPU, x + sum_j d_j s_j with d = V^T b, fused (one program a sample) or split:

SHIFT 1   -H^T x: V = C, lower triangular, and b_j = s_{j+1} . x for n - 1 pairs
SHIFT 0   M x, the type-II operator: V = -W^T (multisecant.py), and b_j = s_j . x for n steps

Two reads of the steps; partial sums are added in a fixed order. `gram` makes the products of the steps that W is made of, and
`weights` makes W of them (triton_weights.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_shared import through
from .triton_weights import addresses, weights

__all__ = ["addresses", "gram", "transpose_combine", "transpose_dots", "transpose_fused", "weights"]


@triton.jit
def _dots(x_ptr, S_ptr, rows, lo, hi, ROW, SHIFT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
          ACC: tl.constexpr):  # fmt: skip
    """b_j = s_{j + SHIFT} . x for `rows` rows, over columns lo .. hi."""
    i = tl.arange(0, BM)
    d = tl.arange(0, BD)
    acc = tl.zeros((BM, BD), ACC)
    for d0 in tl.range(lo, hi, BD, num_stages=STAGES):
        o = d0 + d
        m = o < hi
        x = tl.load(x_ptr + o, mask=m, other=0.0).to(ACC)
        mask = (i[:, None] < rows) & m[None, :]
        acc += tl.load(S_ptr + (i[:, None] + SHIFT) * ROW + o[None, :], mask=mask, other=0.0).to(ACC) * x[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def _weights(b_ptr, V_ptr, rows, LD, SHIFT: tl.constexpr, BM: tl.constexpr):
    """d = V^T b, 16 rows of V at a time; b is read from memory."""
    i = tl.arange(0, BM)
    j = tl.arange(0, 16)
    d = tl.zeros((BM,), V_ptr.dtype.element_ty)
    for j0 in tl.range(0, rows, 16):
        k = j0 + j
        mask = (k[:, None] < rows) & (i[None, :] < rows)
        if SHIFT == 1:
            mask = mask & (i[None, :] <= k[:, None])
        V = tl.load(V_ptr + k[:, None] * LD + i[None, :], mask=mask, other=0.0)
        d += tl.sum(V * tl.load(b_ptr + k, mask=k < rows, other=0.0)[:, None], axis=0)
    return d


@triton.jit
def _add(x_ptr, out_ptr, S_ptr, d_ptr, rows, lo, hi, ROW, BD: tl.constexpr, ACC: tl.constexpr):
    d = tl.arange(0, BD)
    for d0 in tl.range(lo, hi, BD):
        o = d0 + d
        m = o < hi
        y = tl.load(x_ptr + o, mask=m, other=0.0).to(ACC)
        for j in tl.range(0, rows, loop_unroll_factor=4):
            y += tl.load(d_ptr + j) * tl.load(S_ptr + j * ROW + o, mask=m, other=0.0).to(ACC)
        tl.store(out_ptr + o, y, mask=m)


@triton.jit
def transpose_fused(
    x_ptr, out_ptr, S_ptr, C_ptr, n_ptr, d_ptr, D, ROW, LD,
    M: tl.constexpr, SHIFT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BD2: tl.constexpr,
    STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One sample: grid (B,). C is V, (B, M + 1 - SHIFT, LD)."""
    b = tl.program_id(0).to(tl.int64)
    rows = tl.load(n_ptr + b) - SHIFT
    S_ptr += b * (M + 1) * ROW
    i = tl.arange(0, BM)
    d_ptr += b * 2 * BM
    tl.store(d_ptr + BM + i, _dots(x_ptr + b * D, S_ptr, rows, 0, D, ROW, SHIFT, BM, BD, STAGES, ACC))
    tl.debug_barrier()
    tl.store(d_ptr + i, _weights(d_ptr + BM, C_ptr + b * (M + 1 - SHIFT) * LD, rows, LD, SHIFT, BM))
    tl.debug_barrier()
    _add(x_ptr + b * D, out_ptr + b * D, S_ptr, d_ptr, rows, 0, D, ROW, BD2, ACC)


@triton.jit
def transpose_dots(
    x_ptr, S_ptr, n_ptr, part_ptr, D, ROW, SLAB,
    M: tl.constexpr, SHIFT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Partial dot products of a slab of columns: grid (B, slabs). part (B, slabs, BM)."""
    b = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    lo = slab * SLAB
    rows = tl.load(n_ptr + b) - SHIFT
    part = _dots(x_ptr + b * D, S_ptr + b * (M + 1) * ROW, rows, lo, tl.minimum(lo + SLAB, D), ROW, SHIFT, BM, BD, STAGES, ACC)
    tl.store(part_ptr + (b * tl.num_programs(1) + slab) * BM + tl.arange(0, BM), part)


@triton.jit(do_not_specialize=["PARTS"])
def transpose_combine(
    x_ptr, out_ptr, S_ptr, C_ptr, n_ptr, part_ptr, d_ptr, D, ROW, LD, SLAB, PARTS,
    M: tl.constexpr, SHIFT: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Reduce the partial sums, then add the steps to a slab of columns: grid (B, slabs)."""
    b = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    rows = tl.load(n_ptr + b) - SHIFT
    i = tl.arange(0, BM)
    q = tl.arange(0, BP)
    parts = tl.load(part_ptr + (b * PARTS + q[:, None]) * BM + i[None, :], mask=q[:, None] < PARTS, other=0.0)
    d_ptr += (b * tl.num_programs(1) + slab) * 2 * BM
    tl.store(d_ptr + BM + i, tl.sum(parts, axis=0))
    tl.debug_barrier()
    tl.store(d_ptr + i, _weights(d_ptr + BM, C_ptr + b * (M + 1 - SHIFT) * LD, rows, LD, SHIFT, BM))
    tl.debug_barrier()
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    _add(x_ptr + b * D, out_ptr + b * D, S_ptr + b * (M + 1) * ROW, d_ptr, rows, lo, hi, ROW, BD, ACC)


@triton.jit
def _gram(out_ptr, S_ptr, n, lo, hi, ROW, LD: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    i = tl.arange(0, BM)
    d = tl.arange(0, BD)
    acc = tl.zeros((BM, BM), tl.float32)
    for d0 in tl.range(lo, hi, BD):
        o = d0 + d
        s = tl.load(S_ptr + i[:, None] * ROW + o[None, :], mask=(i[:, None] < n) & (o[None, :] < hi), other=0.0).to(tl.float32)
        acc = tl.dot(s, tl.trans(s), acc, input_precision="ieee")
    tl.store(out_ptr + i[:, None] * LD + i[None, :], acc)


@triton.jit
def gram(
    S_ptr, n_ptr, part_ptr, table_ptr, D, ROW, SLAB, M: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, INDIRECT: tl.constexpr
):  # fmt: skip
    """S S^T of the stored steps over a slab of columns, in full fp32 whatever torch allows its own products: grid (B, slabs).
    part (B, slabs, BM, BM), of which only n rows and columns are written. INDIRECT: S and n stand in the table, at 0 and 2. The
    rows of a tile follow n: a tenth of the arithmetic at n = 10 of 64."""
    b = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    if INDIRECT:
        S_ptr = through(S_ptr, table_ptr, 0)
        n_ptr = through(n_ptr, table_ptr, 2)
    n = tl.load(n_ptr + b)
    lo = slab * SLAB
    hi = tl.minimum(lo + SLAB, D)
    S_ptr += b * (M + 1) * ROW
    part_ptr += (b * tl.num_programs(1) + slab) * BM * BM
    if BM <= 16:
        _gram(part_ptr, S_ptr, n, lo, hi, ROW, BM, BM, BD)
    else:
        if n <= 16:
            _gram(part_ptr, S_ptr, n, lo, hi, ROW, BM, 16, BD)
        else:
            _gram(part_ptr, S_ptr, n, lo, hi, ROW, BM, BM, BD)
