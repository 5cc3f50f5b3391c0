"""Launching the Triton products with the stored steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..broyden.state import Factors
from ..tiles import SLAB_COLUMNS, Tiles, power_of_two, tiles
from .multisecant import Multisecant, gram_torch, multisecant_aten


def apply_transpose(factors: Factors, x: Tensor, kernels: Any, cut: Tiles | None = None) -> Tensor:
    """-H^T x for x (B, D) contiguous in the compute dtype; a new tensor. One or two launches, nothing goes to the host."""
    out = torch.empty_like(x)
    _launch(factors.S, factors.C, factors.n, x, out, kernels, cut, shift=1)
    return out


def apply_multisecant(operator: Multisecant, x: Tensor, kernels: Any, cut: Tiles | None = None) -> Tensor:
    """M x for x (B, D) contiguous in the compute dtype; a new tensor, as above."""
    out = torch.empty_like(x)
    _launch(operator.S, operator.V, operator.n, x, out, kernels, cut, shift=0)
    return out


def multisecant(factors: Factors, skip: int, kernels: Any) -> Multisecant:
    """:func:`~.dispatch.multisecant`: one launch for the Gram matrix, then batched n x n algebra; nothing goes to the host."""
    if factors.high < 2 or factors.C.dtype != torch.float32:
        return multisecant_aten(factors, skip)
    return multisecant_aten(factors, skip, gram(factors.S, factors.n, factors.high, kernels))


def gram(S: Tensor, n: Tensor, high: int, kernels: Any, slab: int = 4 * SLAB_COLUMNS) -> Tensor:
    """(B, high, high) fp32 products of the stored steps, zero from n on."""
    B, slots, D = S.shape
    BM = max(power_of_two(high), 16)
    if B == 0 or BM > 128:  # a tile this large would spill
        return gram_torch(S[:, :high], n, torch.float32)
    slabs = max(-(-D // slab), 1)
    part = torch.empty((B, slabs, BM, BM), dtype=torch.float32, device=S.device)
    kernels.gram[(B, slabs)](S, n, part, D, S.stride(1), slab, M=slots - 1, BM=BM, BD=gram_columns(BM), num_warps=gram_warps(BM))
    return part.sum(1)[:, :high, :high]


def gram_warps(BM: int) -> int:
    """Each program holds BM x BM sums in registers."""
    return max(BM // 8, 4)


def gram_columns(BM: int) -> int:
    """Enough that a thread loads 16 bytes of bf16."""
    return 64 if BM < 64 else 32


def _launch(
    S: Tensor, V: Tensor, n: Tensor, x: Tensor, out: Tensor, kernels: Any, cut: Tiles | None, shift: int
) -> None:  # fmt: skip
    import triton.language as tl

    B, D = x.shape
    if B == 0:
        return
    M, LD, row = S.shape[1] - 1, V.shape[2], S.stride(1)
    cut = cut or tiles(B, D, M + 1 - shift, V.element_size())
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    d = torch.empty(2 * B * cut.slabs * cut.BM, dtype=V.dtype, device=x.device)
    if cut.slabs == 1:
        kernels.transpose_fused[(B,)](
            x, out, S, V, n, d, D, row, LD,
            M=M, SHIFT=shift, BM=cut.BM, BD=cut.BD, BD2=cut.BD2, STAGES=cut.stages, ACC=acc, num_warps=cut.warps,
        )  # fmt: skip
        return
    parts = torch.empty(B * cut.slabs * cut.BM, dtype=V.dtype, device=x.device)
    kernels.transpose_dots[(B, cut.slabs)](
        x, S, n, parts, D, row, cut.slab,
        M=M, SHIFT=shift, BM=cut.BM, BD=cut.BD, STAGES=cut.stages, ACC=acc, num_warps=cut.warps,
    )  # fmt: skip
    kernels.transpose_combine[(B, cut.slabs)](
        x, out, S, V, n, parts, d, D, row, LD, cut.slab, cut.slabs,
        M=M, SHIFT=shift, BM=cut.BM, BP=power_of_two(cut.slabs), BD=cut.BD2, ACC=acc, num_warps=cut.warps,
    )  # fmt: skip
