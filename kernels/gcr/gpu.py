"""Launching the Triton adjoint iteration: a state on the device, and a look at the host now and then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..broyden.gpu import NEVER
from ..broyden.state import RUNNING, row_width
from ..device import triton_kernels
from ..reuse import gpu as reuse_gpu
from ..reuse.multisecant import Multisecant
from ..tiles import Tiles, power_of_two, tiles
from .state import DEPENDENT_EPS, GcrState


@dataclass(kw_only=True, eq=False)
class TritonGcr(GcrState):
    """A state that Triton kernels work on. `active`, `batch` and `converged` are what the host last saw.

    kernels     the module of kernels (triton_kernels, or its twin for the interpreter)
    poll_every  VJPs between two looks at the device; 0: never
    limit       cap on VJPs that the device itself watches; None: the host says when the last one is observed
    buffers     batch_norm and batch (scalars), act (B,), h, partial sums: device memory of the launches
    """

    kernels: Any
    buffers: dict[str, Tensor]
    cut: Tiles
    poll_every: int = 4
    limit: int | None = None

    @staticmethod
    def create(
        q: Tensor, operator: Multisecant | None, memory: int, tol: float, floor: float, kernels: Any, cut: Tiles | None = None
    ) -> TritonGcr:
        B, D = q.shape
        counts = torch.zeros((4, B), dtype=torch.int32, device=q.device)
        n, iterations, stall, done = counts.unbind()
        best, mark = q.new_full((2, B), torch.inf).unbind()
        norms = torch.linalg.vector_norm(q, dim=1)
        reuse = triton_kernels("reuse")
        w = q.clone() if operator is None else reuse_gpu.apply_multisecant(operator, q, reuse)
        cut = cut or tiles(B, D, memory, q.element_size())
        buffers = {
            "batch_norm": torch.linalg.vector_norm(norms).reshape(1),
            "batch": q.new_zeros(1),
            "act": torch.zeros(B, dtype=torch.int32, device=q.device),
            "h": q.new_empty(B * 2 * cut.BM),
            "parts": q.new_empty(B * cut.slabs),
        }
        return TritonGcr(
            done=done, best=best, z_best=q.clone(), iterations=iterations, mark=mark, stall=stall, tol=tol, relative=True,
            floor=floor, active=B, q=q, norms=norms, batch_norm=0.0, operator=operator, x=torch.zeros_like(q), r=q.clone(), w=w,
            basis=q.new_empty((B, 2, memory, row_width(D, q.device))), n=n, true_residual=torch.empty_like(q),
            residuals=torch.zeros_like(norms), kernels=kernels, buffers=buffers, cut=cut,
        )  # fmt: skip

    @property
    def needed(self) -> int:
        return int(self.iterations.max()) if self.iterations.numel() else self.evaluations

    def launch(self, jw: Tensor, last: bool) -> None:
        """What :meth:`move` does on the device: nothing is allocated but scratch of M's, nothing goes to the host."""
        import triton.language as tl

        B, D = self.q.shape
        if B == 0:
            return
        acc = tl.float64 if self.q.dtype == torch.float64 else tl.float32
        cut, b = self.cut, self.buffers
        limit = self.limit if self.limit is not None else self.evaluations if last else NEVER
        self.kernels.residual[(B, cut.slabs)](
            self.q, jw.contiguous(), self.w, self.true_residual, b["parts"], D, cut.slab, BD=cut.BD2, ACC=acc, num_warps=4
        )
        self.kernels.judge[(1,)](
            b["parts"], self.norms, b["batch_norm"], self.residuals, b["batch"], self.best, self.mark, self.stall,
            self.iterations, self.done, b["act"], B, cut.slabs, float(self.tol), float(self.floor), limit,
            BB=min(max(power_of_two(B), 16), 256), ACC=acc, num_warps=4,
        )  # fmt: skip
        self.kernels.extend[(B,)](
            self.x, self.r, self.w, self.true_residual, self.basis, self.z_best, self.n, self.done, b["act"], b["h"], D,
            self.basis.shape[3], DEPENDENT_EPS * torch.finfo(self.q.dtype).eps,
            M=self.memory, BM=cut.BM, BD=cut.BD, BD2=cut.BD2, STAGES=cut.stages, IDENTITY=self.operator is None, ACC=acc,
            num_warps=cut.warps if cut.slabs == 1 else 8,
        )  # fmt: skip
        if self.operator is not None:
            reuse_gpu.add_multisecant(self.operator, self.r, self.x, self.done, self.w, triton_kernels("reuse"))

    def move(self, jw: Tensor, last: bool, look: bool) -> None:
        self.evaluations += 1
        self.launch(jw, last)
        if last or look or (self.poll_every and self.evaluations % self.poll_every == 0):
            self.active = int((self.done == RUNNING).sum())
            self.batch = float(self.buffers["batch"])
            self.converged = self.active == 0 and self.batch <= self.tol
