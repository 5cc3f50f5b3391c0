"""Launching the Triton products with the stored steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..broyden.gpu import Held
from ..broyden.state import Factors
from ..tiles import SLAB_COLUMNS, Tiles, power_of_two, tiles
from .multisecant import Multisecant, empty_weights, multisecant_aten

GRAM_SLAB = 4 * SLAB_COLUMNS
GRAM_COLUMNS = 64  # enough that a thread loads 16 bytes of bf16
# A program of `weights` holds 64 x 64 sums in float64; each works on many samples where there are more of them than this.
MOST_SLOTS, WEIGHT_PROGRAMS = 64, 128


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
    """:func:`~.dispatch.multisecant` in two launches; nothing goes to the host. ATen where a kernel would not fit."""
    if not weighs(factors):
        return multisecant_aten(factors, skip)
    V, n = empty_weights(factors), torch.empty_like(factors.n)
    operator = Multisecant(S=factors.S, V=V, n=n, slots_written=factors.slots_written)
    make_weights(factors, operator, skip, kernels)
    return operator


def weighs(factors: Factors) -> bool:
    """Whether the kernels make the weights of these factors: fp32, at most 64 steps."""
    slots = factors.S.shape[1]
    return factors.slots_written >= 2 and factors.C.dtype == torch.float32 and slots <= MOST_SLOTS and factors.S.shape[0] > 0


@dataclass
class Workspace:
    """What `make_weights` works in, to be made once for a captured graph.

    part   (B, slabs, LD, LD) fp32, Gram matrices of slabs
    work   float64, for each program
    sizes  slots, D, and the row length of S
    """

    part: Tensor
    work: Tensor
    sizes: tuple[int, int, int]

    @staticmethod
    def like(S: Tensor) -> Workspace:
        """For steps (B, M+1, D)."""
        B, slots, D = S.shape
        LD = weight_rows(slots)
        slabs = max(-(-D // GRAM_SLAB), 1)
        return Workspace(
            part=torch.empty((B, slabs, LD, LD), dtype=torch.float32, device=S.device),
            work=torch.empty((min(B, WEIGHT_PROGRAMS), 3 * LD + 2, LD), dtype=torch.float64, device=S.device),
            sizes=(slots, D, S.stride(1)),
        )


def make_weights(
    factors: Factors, operator: Multisecant, skip: int, kernels: Any, table: Tensor | None = None, room: Workspace | None = None
) -> None:
    """Fill `operator.V` and `operator.n` from the steps: two launches.

    Args:
        factors: what is read; with a `table` only its dtypes and the row length of C are.
        operator: V (B, M+1, LDV) and n (B,) are written.
        skip: pairs that are left out, oldest first.
        table: (3,) int64, the addresses of S, C and n; see `point_at`.
        room: of an earlier call of the same shapes.
    """
    S, C, n = factors.S, factors.C, factors.n
    room = room or Workspace.like(S)
    (B, slabs, LD, _), (slots, D, row) = room.part.shape, room.sizes
    where = n if table is None else table
    kernels.gram[(B, slabs)](
        S, n, room.part, where, D, row, GRAM_SLAB,
        M=slots - 1, BM=LD, BD=GRAM_COLUMNS, INDIRECT=table is not None, num_warps=gram_warps(LD),
    )  # fmt: skip
    kernels.weights[(room.work.shape[0],)](
        room.part, C, n, operator.n, operator.V, room.work, where, B, slabs, C.shape[2], operator.V.shape[2], skip,
        M=slots - 1, LD=LD, INDIRECT=table is not None, num_warps=weight_warps(LD),
    )  # fmt: skip


def point_at(factors: Factors, table: Tensor, kernels: Any, held: Held) -> None:
    """Write into a table where the factors lie: one launch."""
    addresses = [t.data_ptr() for t in (factors.S, factors.C, factors.n)]
    if any(a % 16 for a in addresses):
        raise ValueError(f"expected factors at multiples of 16 bytes, got addresses {addresses}")
    held.launch(kernels.addresses, (1, 1, 1), table, *addresses, num_warps=1)


def weight_rows(slots: int) -> int:
    """Rows of the matrices that make the weights."""
    return max(power_of_two(slots), 16)


def weight_warps(LD: int) -> int:
    return max(LD * LD // 512, 1)


def gram_warps(BM: int) -> int:
    """Each program holds BM x BM sums in registers."""
    return min(max(BM // 4, 4), 16)


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
