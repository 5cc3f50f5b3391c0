"""The adjoint iteration in C++: one call between two VJPs, every sample with its own basis."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from ..broyden.state import coefficient_width
from ..reuse.cpu import native_operator
from ..reuse.multisecant import Multisecant
from .state import DEPENDENT_EPS, GcrState


@dataclass(kw_only=True, eq=False)
class CpuGcr(GcrState):
    """A state that C++ works on. `count` of the lockstep implementation is not used."""

    functions: native.Functions
    struct: native.Broyden
    pointers: tuple[int, ...]
    going: ctypes.c_int64

    @staticmethod
    def create(
        q: Tensor, operator: Multisecant | None, memory: int, tol: float, floor: float, functions: native.Functions
    ) -> CpuGcr:
        """All tensors are uninitialised before, and filled by C++."""
        B, D = q.shape
        best, mark, norms, residuals = torch.empty((4, B), dtype=q.dtype).unbind()
        n, iterations, stall = torch.empty((3, B), dtype=torch.int32).unbind()
        done = torch.empty(B, dtype=torch.int8)
        z_best, x, r, w, true_residual = torch.empty((5, B, D), dtype=q.dtype).unbind()
        basis = torch.empty((B, 2, memory, D), dtype=q.dtype)
        V = None if operator is None else operator.V
        struct = native.Broyden(
            B=B, D=D, M=memory, ld=max(coefficient_width(memory), 0 if V is None else V.shape[2]),
            threads=native.threads_for(q.numel()), relative=True, tol=tol, floor=floor, S=basis.data_ptr(),
            best=best.data_ptr(), mark=mark.data_ptr(), z_best=z_best.data_ptr(), n=n.data_ptr(),
            iterations=iterations.data_ptr(), stall=stall.data_ptr(), done=done.data_ptr(),
        )  # fmt: skip
        at = (ctypes.addressof(native_operator(operator)), ctypes.addressof(struct), q.data_ptr())
        batch_norm = functions.gcr_start(*at, x.data_ptr(), r.data_ptr(), w.data_ptr(), norms.data_ptr())
        return CpuGcr(
            done=done, best=best, z_best=z_best, iterations=iterations, mark=mark, stall=stall, tol=tol, relative=True,
            floor=floor, active=B, q=q, norms=norms, batch_norm=batch_norm, operator=operator, x=x, r=r, w=w, basis=basis, n=n,
            true_residual=true_residual, residuals=residuals, functions=functions, struct=struct, pointers=at,
            going=ctypes.c_int64(),
        )  # fmt: skip

    def move(self, jw: Tensor, last: bool) -> None:
        self.evaluations += 1
        jw = jw.contiguous()
        batch = self.functions.gcr_step(
            *self.pointers, jw.data_ptr(), self.x.data_ptr(), self.r.data_ptr(), self.w.data_ptr(), self.norms.data_ptr(),
            self.tol * self.batch_norm, self.true_residual.data_ptr(), self.residuals.data_ptr(),
            DEPENDENT_EPS * torch.finfo(self.q.dtype).eps, self.evaluations, last, ctypes.addressof(self.going),
        )  # fmt: skip
        self.batch = batch / self.batch_norm if self.batch_norm else 0.0
        self.converged = self.batch <= self.tol
        if not self.converged:
            self.active = self.going.value
