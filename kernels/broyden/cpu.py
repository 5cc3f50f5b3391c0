"""The fused C++ step: one call an iteration, every sample with its own number of stored steps."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from .. import native
from .state import BroydenState, Factors, coefficient_width, shaped_buffers

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


class CpuState(native.Rows, BroydenState):
    """A Broyden state that C++ works on. `count`, `high` and `guarded` of the lockstep implementation are not used."""

    _ROWS: ClassVar = {
        "best": (0, None), "mark": (1, None), "iterations": (2, torch.int32), "stall": (3, torch.int32), "done": (4, torch.int8)
    }  # fmt: skip

    def __init__(
        self, z0: Tensor, S: Tensor, C: Tensor, memory: int, *, eta: float, tol: float, relative: bool, floor: float,
        functions: native.Functions,
    ) -> None:  # fmt: skip
        """No step stored yet. S and C may be flat; all tensors but z0 are uninitialised before, and filled by C++."""
        B, D = z0.shape
        z0 = z0.contiguous()
        self.small = torch.empty((len(self._ROWS), B), dtype=z0.dtype)
        self.n, self.reports = torch.empty(B, dtype=torch.int32), torch.empty((B, 2))
        self.z_best = torch.empty_like(z0)
        self.buffers, self.shape = (S, C), (B, memory, D)
        self.eta, self.tol, self.relative, self.floor, self.active = eta, tol, relative, floor, B
        self.settled = False  # whether C++ has stopped every sample
        self.functions = functions
        at, row = self.small.data_ptr(), B * z0.element_size()
        self.struct = native.Broyden(
            B, D, memory, coefficient_width(memory), native.threads_for(B * D), relative, tol, floor, eta,
            S.data_ptr(), C.data_ptr(), at, at + row, self.z_best.data_ptr(), self.n.data_ptr(), at + 2 * row, at + 3 * row,
            at + 4 * row, self.reports.data_ptr(), 0,
        )  # fmt: skip
        self.address = ctypes.addressof(self.struct)
        functions.start(self.address, z0.data_ptr())

    def __getattr__(self, name: str) -> Tensor:
        if name not in ("S", "C"):
            return super().__getattr__(name)
        B, memory, D = self.shape
        self.S, self.C = shaped_buffers(*self.buffers, B, D, memory)
        return self.S if name == "S" else self.C

    def about(self) -> Tensor:
        return self.reports if self.settled else super().about()

    def all_converged(self) -> bool:
        return self.struct.converged == self.struct.B if self.settled else super().all_converged()

    def _call(self, z: Tensor, f: Tensor, norms: Tensor | None, flags: int) -> None:
        if f.dtype != z.dtype or not f.is_contiguous():
            f = f.to(z.dtype).contiguous()
        if not z.is_contiguous():
            raise ValueError(f"expected z contiguous, got strides {z.stride()} for shape {tuple(z.shape)}")
        if norms is not None:
            norms = norms.to(z.dtype).contiguous()
        norms_at = None if norms is None else norms.data_ptr()
        self.active = self.functions.step(self.address, z.data_ptr(), f.data_ptr(), norms_at, self.evaluations, flags)
        self.settled = not self.active

    def step(self, z: Tensor, f: Tensor, *, stop_norm: Tensor | None = None, last: bool = False) -> None:
        self.evaluations += 1
        self._call(z, f, stop_norm, _LAST if last else 0)

    def step_residual(self, z: Tensor, g: Tensor, stop_norm: Tensor, *, last: bool = False) -> None:
        self.evaluations += 1
        self._call(z, g, stop_norm, _RESIDUAL_GIVEN | (_LAST if last else 0))

    def advance(self, z: Tensor, g: Tensor) -> None:
        self._call(z, g, None, _RESIDUAL_GIVEN | _NO_OBSERVATION)
