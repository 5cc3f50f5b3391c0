"""Launching the Triton product with the transposed factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..broyden.state import Factors
from ..tiles import Tiles, power_of_two, tiles


def apply_transpose(factors: Factors, x: Tensor, kernels: Any, cut: Tiles | None = None) -> Tensor:
    """-H^T x for x (B, D) contiguous in the compute dtype; a new tensor. One or two launches, nothing goes to the host."""
    import triton.language as tl

    B, D = x.shape
    out = torch.empty_like(x)
    if B == 0:
        return out
    S, C = factors.S, factors.C
    M, LD, row = factors.memory, C.shape[2], S.stride(1)
    cut = cut or tiles(B, D, M, C.element_size())
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    d = torch.empty(2 * B * cut.slabs * cut.BM, dtype=C.dtype, device=x.device)
    if cut.slabs == 1:
        kernels.transpose_fused[(B,)](
            x, out, S, C, factors.n, d, D, row, LD,
            M=M, BM=cut.BM, BD=cut.BD, BD2=cut.BD2, STAGES=cut.stages, ACC=acc, num_warps=cut.warps,
        )  # fmt: skip
        return out
    parts = torch.empty(B * cut.slabs * cut.BM, dtype=C.dtype, device=x.device)
    kernels.transpose_dots[(B, cut.slabs)](
        x, S, factors.n, parts, D, row, cut.slab,
        M=M, BM=cut.BM, BD=cut.BD, STAGES=cut.stages, ACC=acc, num_warps=cut.warps,
    )  # fmt: skip
    kernels.transpose_combine[(B, cut.slabs)](
        x, out, S, C, factors.n, parts, d, D, row, LD, cut.slab, cut.slabs,
        M=M, BM=cut.BM, BP=power_of_two(cut.slabs), BD=cut.BD2, ACC=acc, num_warps=cut.warps,
    )  # fmt: skip
    return out
