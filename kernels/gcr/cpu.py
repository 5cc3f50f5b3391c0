"""The adjoint iteration in C++: one call between two VJPs, every sample with its own basis."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from .. import native, workspace
from ..broyden.state import coefficient_width
from ..reuse.cpu import native_operator
from ..reuse.multisecant import Multisecant
from .state import DEPENDENT_EPS, GcrState

# Pairs that the basis has room for at first. Few solves need more, and a buffer for all of `memory` is mostly never used.
PAIRS = 8


class CpuGcr(native.Rows, GcrState):
    """A state that C++ works on. `count` of the lockstep implementation is not used; x and r are set by the first move."""

    _ROWS: ClassVar = {
        "best": (0, None), "mark": (1, None), "norms": (2, None), "residuals": (3, None), "n": (4, torch.int32),
        "iterations": (5, torch.int32), "stall": (6, torch.int32), "done": (7, torch.int8),
    }  # fmt: skip
    _BLOCKS: ClassVar = {"z_best": 0, "x": 1, "r": 2, "w": 3}

    def __init__(
        self, q: Tensor, operator: Multisecant | None, memory: int, tol: float, floor: float, functions: native.Functions
    ) -> None:
        """All tensors are uninitialised before, and filled by C++."""
        B, D = q.shape
        self.most = memory  # pairs to which the basis may grow
        pairs = min(memory, PAIRS)
        self.small = torch.empty((len(self._ROWS), B), dtype=q.dtype)
        self.room = workspace.empty((len(self._BLOCKS) + 2 * pairs, B, D), q.dtype)
        self.grown: Tensor | None = None  # the basis, once it has outgrown the room
        self.q, self.operator, self.functions = q, operator, functions
        self.tol, self.floor, self.relative, self.active = tol, floor, True, B
        at, row = self.small.data_ptr(), B * q.element_size()
        big, block = self.room.data_ptr(), row * D
        ld = coefficient_width(memory)
        self.progress = native.Broyden(
            B, D, pairs, ld if operator is None else max(ld, operator.V.shape[2]), native.threads_for(B * D), 1,
            tol, floor, 0.0,
            big + 4 * block, None, at, at + row, big, at + 4 * row, at + 5 * row, at + 6 * row, at + 7 * row, None, 0,
        )  # fmt: skip
        self.struct = native.Gcr(
            ctypes.addressof(native_operator(operator)), ctypes.addressof(self.progress), q.data_ptr(),
            big + block, big + 2 * block, big + 3 * block, at + 2 * row, at + 3 * row,
            tol, DEPENDENT_EPS * torch.finfo(q.dtype).eps, 0.0, 0,
        )  # fmt: skip
        self.address = ctypes.addressof(self.struct)
        functions.gcr_start(self.address)
        self.w = self.room[self._BLOCKS["w"]]

    def __getattr__(self, name: str) -> Tensor:
        if name == "basis":
            (B, D), pairs = self.q.shape, self.progress.M
            return self.room[len(self._BLOCKS) :].view(B, 2, pairs, D) if self.grown is None else self.grown
        if name not in self._BLOCKS:
            return super().__getattr__(name)
        block = self.room[self._BLOCKS[name]]
        setattr(self, name, block)
        return block

    @property
    def batch_norm(self) -> float:  # type: ignore[override]
        return self.struct.batch_norm

    def move(self, jw: Tensor, last: bool) -> None:
        self.evaluations += 1
        if not jw.is_contiguous():
            jw = jw.contiguous()
        if self.evaluations > self.progress.M < self.most:
            self._grow()
        self.batch = self.functions.gcr_step(self.address, jw.data_ptr(), self.evaluations, last)
        self.converged = self.batch <= self.tol
        if not self.converged:
            self.active = self.struct.active

    def _grow(self) -> None:
        """Room for twice as many pairs: no sample can have more of them than VJPs were seen before this one."""
        before = self.basis
        B, _, pairs, D = before.shape
        more = min(2 * pairs, self.most)
        basis = workspace.empty((B, 2, more, D), self.q.dtype)
        basis[:, :, :pairs] = before
        self.grown, self.progress.S, self.progress.M = basis, basis.data_ptr(), more
