"""The fused C++ step: one call an iteration, every sample with its own number of stored steps."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from .state import BroydenState, Factors

_LAST, _NO_OBSERVATION, _RESIDUAL_GIVEN = 1, 2, 4


def describe(factors: Factors) -> native.Broyden:
    """The C++ view of factors; made once for each."""
    if isinstance(factors, CpuState):
        return factors.struct
    if factors.native is None:
        B, slots, D = factors.S.shape
        struct = native.Broyden(B=B, D=D, M=slots - 1, ld=factors.C.shape[2], threads=native.threads_for(B * D))
        struct.S, struct.C, struct.n = factors.S.data_ptr(), factors.C.data_ptr(), factors.n.data_ptr()
        factors.native = struct
    return factors.native


@dataclass(kw_only=True, eq=False)
class CpuState(BroydenState):
    """A Broyden state that C++ works on. `count`, `high` and `guarded` of the lockstep implementation are not used."""

    functions: native.Functions
    struct: native.Broyden
    address: int

    @staticmethod
    def create(
        z0: Tensor, S: Tensor, C: Tensor, *, eta: float, tol: float, relative: bool, floor: float, functions: native.Functions
    ) -> CpuState:
        """No step stored yet; all tensors but z0 are uninitialised before, and filled here."""
        B, D = z0.shape
        z0 = z0.contiguous()
        small = torch.empty((2, B), dtype=z0.dtype)
        counts = torch.empty((3, B), dtype=torch.int32)
        (best, mark), (n, iterations, stall) = small.unbind(), counts.unbind()
        done, z_best = torch.empty(B, dtype=torch.int8), torch.empty_like(z0)
        at, ints = small.data_ptr(), counts.data_ptr()
        struct = native.Broyden(
            B, D, C.shape[1], C.shape[2], native.threads_for(z0.numel()), relative, tol, floor, eta,
            S.data_ptr(), C.data_ptr(), at, at + B * z0.element_size(), z_best.data_ptr(), ints, ints + 4 * B, ints + 8 * B,
            done.data_ptr(),
        )  # fmt: skip
        address = ctypes.addressof(struct)
        functions.start(address, z0.data_ptr())
        return CpuState(
            S=S, C=C, n=n, done=done, best=best, z_best=z_best, iterations=iterations, mark=mark, stall=stall, tol=tol,
            relative=relative, floor=floor, active=B, eta=eta, functions=functions, struct=struct, address=address,
        )  # fmt: skip

    def _call(self, z: Tensor, f: Tensor, norms: Tensor | None, flags: int) -> None:
        if f.dtype != z.dtype or not f.is_contiguous():
            f = f.to(z.dtype).contiguous()
        if not z.is_contiguous():
            raise ValueError(f"expected z contiguous, got strides {z.stride()} for shape {tuple(z.shape)}")
        if norms is not None:
            norms = norms.to(z.dtype).contiguous()
        norms_at = None if norms is None else norms.data_ptr()
        self.active = self.functions.step(self.address, z.data_ptr(), f.data_ptr(), norms_at, self.evaluations, flags)

    def step(self, z: Tensor, f: Tensor, *, stop_norm: Tensor | None = None, last: bool = False) -> None:
        self.evaluations += 1
        self._call(z, f, stop_norm, _LAST if last else 0)

    def step_residual(self, z: Tensor, g: Tensor, stop_norm: Tensor, *, last: bool = False) -> None:
        self.evaluations += 1
        self._call(z, g, stop_norm, _RESIDUAL_GIVEN | (_LAST if last else 0))

    def advance(self, z: Tensor, g: Tensor) -> None:
        self._call(z, g, None, _RESIDUAL_GIVEN | _NO_OBSERVATION)
