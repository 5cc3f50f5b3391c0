"""The adjoint iteration in C++: one call between two VJPs, every sample with its own basis."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native, workspace
from ..broyden.state import coefficient_width
from ..reuse.cpu import native_operator
from ..reuse.multisecant import Multisecant
from .state import DEPENDENT_EPS, GcrState

# Pairs that the basis has room for at first. Few solves need more, and a buffer for all of `memory` is mostly never used.
PAIRS = 8


@dataclass(kw_only=True, eq=False)
class CpuGcr(GcrState):
    """A state that C++ works on. `count` of the lockstep implementation is not used."""

    functions: native.Functions
    struct: native.Gcr
    progress: native.Broyden
    address: int
    most: int  # pairs to which the basis may grow

    @staticmethod
    def create(
        q: Tensor, operator: Multisecant | None, memory: int, tol: float, floor: float, functions: native.Functions
    ) -> CpuGcr:
        """All tensors are uninitialised before, and filled by C++."""
        B, D = q.shape
        small = torch.empty((6, B), dtype=q.dtype)
        best, mark, norms, residuals, *_ = small.unbind()  # the last two rows are C++'s own
        counts = torch.empty((3, B), dtype=torch.int32)
        n, iterations, stall = counts.unbind()
        done = torch.empty(B, dtype=torch.int8)
        room = workspace.empty((5, B, D), q.dtype)
        z_best, x, r, w, true_residual = room.unbind()
        pairs = min(memory, PAIRS)
        basis = workspace.empty((B, 2, pairs, D), q.dtype)
        row, line = B * q.element_size(), B * D * q.element_size()
        at, ints, big = small.data_ptr(), counts.data_ptr(), room.data_ptr()
        ld = coefficient_width(memory)
        progress = native.Broyden(
            B, D, pairs, ld if operator is None else max(ld, operator.V.shape[2]), native.threads_for(q.numel()), 1,
            tol, floor, 0.0,
            basis.data_ptr(), None, at, at + row, big, ints, ints + 4 * B, ints + 8 * B, done.data_ptr(),
        )  # fmt: skip
        struct = native.Gcr(
            ctypes.addressof(native_operator(operator)), ctypes.addressof(progress), q.data_ptr(),
            big + line, big + 2 * line, big + 3 * line, big + 4 * line, at + 2 * row, at + 3 * row, at + 4 * row,
            0.0, DEPENDENT_EPS * torch.finfo(q.dtype).eps, 0,
        )  # fmt: skip
        address = ctypes.addressof(struct)
        batch_norm = functions.gcr_start(address)
        struct.stop = tol * batch_norm
        return CpuGcr(
            done=done, best=best, z_best=z_best, iterations=iterations, mark=mark, stall=stall, tol=tol, relative=True,
            floor=floor, active=B, q=q, norms=norms, batch_norm=batch_norm, operator=operator, x=x, r=r, w=w, basis=basis, n=n,
            true_residual=true_residual, residuals=residuals, functions=functions, struct=struct, progress=progress,
            address=address, most=memory,
        )  # fmt: skip

    def move(self, jw: Tensor, last: bool) -> None:
        self.evaluations += 1
        if not jw.is_contiguous():
            jw = jw.contiguous()
        if self.evaluations > self.memory < self.most:
            self._grow()
        batch = self.functions.gcr_step(self.address, jw.data_ptr(), self.evaluations, last)
        self.batch = batch / self.batch_norm if self.batch_norm else 0.0
        self.converged = self.batch <= self.tol
        if not self.converged:
            self.active = self.struct.active

    def _grow(self) -> None:
        """Room for twice as many pairs: no sample can have more of them than VJPs were seen before this one."""
        B, _, pairs, D = self.basis.shape
        more = min(2 * pairs, self.most)
        basis = workspace.empty((B, 2, more, D), self.q.dtype)
        basis[:, :, :pairs] = self.basis
        self.basis, self.progress.S, self.progress.M = basis, basis.data_ptr(), more
