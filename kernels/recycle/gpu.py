"""Launching the Triton products with a shared inverse: two launches for a batch, nothing goes to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..tiles import MOST_SLABS, offsets_fit, padded, power_of_two
from .shared import Shared

# The largest rank the kernels take: sums of a program, BB x BR x BD, lie in registers.
MOST_RANK = 16
SUMS, WARPS, STAGES = 8192, 8, 2
# Columns of a tile of `thin_apply`, over its samples; and of one program at least.
APPLY, LEAST_SLAB = 4096, 1024
# Programs that fill a GPU; and samples that a program takes, where there are more than enough of them.
PROGRAMS, MOST_SAMPLES = 256, 4

Run = Callable[..., None]


def launched(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    kernel[grid](*args, **constants)


@dataclass(frozen=True)
class Cut:
    """How the launches for B samples of D elements and rank r cut their work.

    samples  BB, of a program
    rows     BR, of a tile of Y: a power of two, at least r
    columns  of `thin_weights`, of `thin_apply`
    slabs    programs a row is split over, of `slab` columns each
    """

    samples: int
    rows: int
    columns: tuple[int, int]
    slabs: int
    slab: int

    @staticmethod
    def of(B: int, D: int, rank: int, element_size: int) -> Cut:
        samples = min(max(power_of_two(B // PROGRAMS), 1), MOST_SAMPLES)
        slabs = max(min(-(-D // LEAST_SLAB), -(-PROGRAMS // -(-max(B, 1) // samples)), MOST_SLABS), 1)
        slab = (-(-D // slabs) + 15) // 16 * 16
        rows, scale = power_of_two(rank), max(element_size // 4, 1)
        longest = max(power_of_two(slab), 16)
        columns = SUMS // (samples * rows * scale), APPLY // (samples * scale)
        return Cut(samples, rows, (min(columns[0], 1024, longest), min(columns[1], 1024, longest)), -(-D // slab), slab)

    def programs(self, B: int) -> int:
        """That take B samples."""
        return -(-B // self.samples)


@dataclass(eq=False)
class Products:
    """P = I - A^T Y for states like one (B, D), and the buffers that its launches work in.

    A, Y     (r, D) contiguous, compute dtype
    part, c  what the launches hand on
    squares  (2, padded(B)) of |f - z| and |f|
    """

    kernels: Any
    cut: Cut
    A: Tensor
    Y: Tensor
    part: Tensor
    c: Tensor
    squares: Tensor

    @staticmethod
    def of(shared: Shared, like: Tensor, kernels: Any, cut: Cut | None = None) -> Products:
        B, D = like.shape
        cut = cut or Cut.of(B, D, shared.rank, like.element_size())
        return Products(
            kernels, cut, shared.A.contiguous(), shared.Yt.T.contiguous(), like.new_empty(B * cut.slabs * (cut.rows + 2)),
            like.new_empty(cut.programs(B) * cut.slabs * cut.samples * cut.rows), like.new_empty((2, padded(B))),
        )  # fmt: skip

    def own(self) -> Products:
        """The same on copies of A and Y, which `load` fills: for a captured graph."""
        return replace(self, A=self.A.clone(), Y=self.Y.clone())

    def load(self, shared: Shared) -> None:
        """Go on with another shared inverse, of the same rank: 2 r D elements are copied."""
        self.A.copy_(shared.A)
        self.Y.copy_(shared.Yt.T)

    def residual(self, f: Tensor, z: Tensor, done: Tensor, out: Tensor, run: Run = launched) -> Tensor:
        """Write P (f - z) to `out`; the squares of |f - z| and |f|, (2, padded(B)), of this object and written by its next call.

        Args:
            f: (B, D), any floating dtype.
            z: (B, D) contiguous, compute dtype; so is `out`. Where |f - z| is not finite, `out` gets f.
            done: (B,) int32; rows of samples that have stopped are left as they are.
        """
        self._launch(f.contiguous(), z, done, out, True, run)
        return self.squares

    def onto(self, x: Tensor, w: Tensor, done: Tensor, run: Run = launched) -> None:
        """w <- x + P (w - x) for the samples that still run; both (B, D) contiguous."""
        self._launch(w, x, done, w, False, run)

    def _launch(self, f: Tensor, z: Tensor, done: Tensor, out: Tensor, residual: bool, run: Run) -> None:
        import triton.language as tl

        B, D = z.shape
        if B == 0:
            return
        if not (z.is_contiguous() and out.is_contiguous()):
            raise ValueError(f"expected z and out contiguous, got strides {z.stride()} and {out.stride()}")
        cut, grid = self.cut, (self.cut.programs(B), self.cut.slabs)
        acc = tl.float64 if z.dtype == torch.float64 else tl.float32
        run(
            self.kernels.thin_weights, grid, f, z, self.Y, done, self.part, B, len(self.Y), D, cut.slab,
            BB=cut.samples, BR=cut.rows, BD=cut.columns[0], STAGES=STAGES, SQUARES=residual, ACC=acc, num_warps=WARPS,
        )  # fmt: skip
        run(
            self.kernels.thin_apply, grid, f, z, self.A, done, self.part, self.c, self.squares, out, B, len(self.Y), D, cut.slab,
            cut.slabs, BB=cut.samples, BR=cut.rows, BP=power_of_two(cut.slabs), BD=cut.columns[1], RESIDUAL=residual, ACC=acc,
            num_warps=WARPS,
        )  # fmt: skip


def serves(shared: Shared, like: Tensor) -> bool:
    """Whether the kernels can take states like one (B, D) through it."""
    return shared.rank <= MOST_RANK and offsets_fit(shared.rank, like.shape[1])
