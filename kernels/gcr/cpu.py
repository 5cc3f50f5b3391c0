"""The adjoint iteration in C++: one call between two VJPs, every sample with its own basis."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from .. import native, workspace
from ..broyden.state import coefficient_width
from ..reuse.cpu import native_operator
from ..reuse.multisecant import Multisecant
from .state import DEPENDENT_EPS, GcrState

# Pairs that a first basis has room for. Few solves need more, and a buffer for all of `memory` is mostly never used.
PAIRS = 8


@functools.lru_cache(maxsize=256)
def _plan(B: int, D: int, pairs: int, dtype: torch.dtype) -> tuple[dict[str, workspace.Place], int]:
    """Where the parts of a state lie; `basis` for so many pairs."""
    rows = ((name, dtype, B) for name in ("best", "mark", "norms", "residuals"))
    counts = ((name, torch.int32, B) for name in ("n", "iterations", "stall"))
    blocks = ((name, dtype, B * D) for name in ("z_best", "x", "r", "w"))
    structs = ("struct", torch.uint8, native.GCR.size), ("progress", torch.uint8, native.BROYDEN.size)
    return workspace.plan([*structs, *rows, *counts, ("done", torch.int8, B), *blocks, ("basis", dtype, 2 * pairs * B * D)])


class CpuGcr(native.Parts, GcrState):
    """A state that C++ works on. `count` of the lockstep implementation is not used; x and r are set by the first move."""

    def __init__(
        self, q: Tensor, operator: Multisecant | None, memory: int, tol: float, floor: float, capacity: int | None,
        functions: native.Functions,
    ) -> None:  # fmt: skip
        """All is uninitialised before, and filled by C++."""
        B, D = q.shape
        self.pairs = pairs = min(memory, PAIRS if capacity is None else (capacity + 3) // 4 * 4)
        self.most = memory  # pairs to which the basis may grow
        self.places, size = _plan(B, D, pairs, q.dtype)
        self.arena = workspace.Arena(size)
        self.q, self.operator, self.functions = q, operator, functions
        self.tol, self.floor, self.relative, self.active = tol, floor, True, B
        self.address = at = self.arena.address  # the struct is the first part
        ld = coefficient_width(memory)

        def part(name: str) -> int:
            return at + self.places[name][2]

        native.BROYDEN.pack_into(
            self.arena.lease, self.places["progress"][2],
            B, D, pairs, ld if operator is None else max(ld, operator.V.shape[2]), native.threads_for(B * D), 1,
            tol, floor, 0.0,
            part("basis"), 0, part("best"), part("mark"), 0, part("z_best"), part("n"), part("iterations"), part("stall"),
            part("done"), 0, 0,
        )  # fmt: skip
        native.GCR.pack_into(
            self.arena.lease, 0,
            ctypes.addressof(native_operator(operator)), part("progress"), q.data_ptr(),
            part("x"), part("r"), part("w"), part("norms"), part("residuals"),
            tol, DEPENDENT_EPS * torch.finfo(q.dtype).eps, 0.0, 0,
        )  # fmt: skip
        functions.gcr_start(at)

    @property
    def struct(self) -> native.Gcr:
        return native.Gcr.from_address(self.address)

    @property
    def progress(self) -> native.Broyden:
        return native.Broyden.from_address(self.address + self.places["progress"][2])

    def shaped(self, name: str, flat: Tensor) -> Tensor:
        if name == "basis":
            return flat.view(self.q.shape[0], 2, self.pairs, self.q.shape[1])
        return flat.view(self.q.shape) if name in ("z_best", "x", "r", "w") else flat

    @property
    def batch_norm(self) -> float:  # type: ignore[override]
        return self.struct.batch_norm

    def move(self, jw: Tensor, last: bool) -> None:
        self.evaluations += 1
        if not jw.is_contiguous():
            jw = jw.contiguous()
        if self.evaluations > self.pairs < self.most:
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
        progress = self.progress
        self.basis, self.pairs = basis, more
        progress.S, progress.M = basis.data_ptr(), more
