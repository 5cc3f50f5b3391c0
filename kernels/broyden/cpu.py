"""The fused C++ step: one call an iteration, every sample with its own number of stored steps."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import native, workspace
from .state import BroydenState, Factors, coefficient_width, new_factors

_LAST, _NO_OBSERVATION, _RESIDUAL_GIVEN, _PRECONDITIONED, _PLAIN, _ANDERSON = 1, 2, 4, 8, 16, 32


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


@functools.lru_cache(maxsize=256)
def _plan(B: int, D: int, capacity: int, dtype: torch.dtype, S: bool, C: bool) -> tuple[dict[str, workspace.Place], int]:
    """Where the parts of a state lie. S and C: whether the factors are among them, for `capacity` updates."""
    rows = ((name, dtype, B) for name in ("best", "mark", "ceiling"))
    counts = ((name, torch.int32, B) for name in ("n", "iterations", "stall"))
    parts = [("struct", torch.uint8, native.BROYDEN.size), *rows, *counts, ("done", torch.int8, B), ("z", dtype, B * D)]
    if C:
        parts.append(("C", dtype, B * capacity * coefficient_width(capacity)))
    if S:
        parts.append(("S", dtype, B * (capacity + 1) * D))
    return workspace.plan(parts)


class CpuState(native.Parts, BroydenState):
    """A Broyden state that C++ works on. `count` and `guarded` of the lockstep implementation are not used.

    capacity  updates that S and C have room for; grows up to `most`, where the solver restarts
    """

    def __init__(
        self, z0: Tensor, S: Tensor | None, C: Tensor | None, memory: int, capacity: int | None, *, eta: float, tol: float,
        relative: bool, floor: float, functions: native.Functions,
    ) -> None:  # fmt: skip
        """No step stored yet. All is uninitialised before, and filled by C++."""
        B, D = z0.shape
        z0 = z0.contiguous()
        self.most = memory
        self.capacity = capacity = memory if capacity is None or S is not None or C is not None else min(capacity, memory)
        self.places, size = _plan(B, D, capacity, z0.dtype, S is None, C is None)
        self.arena = workspace.Arena(size)
        self.z_best, self.reports = torch.empty_like(z0), torch.empty((B, 3))
        self.eta, self.tol, self.relative, self.floor, self.active = eta, tol, relative, floor, B
        self.grown = False
        self.moves = 0  # calls of C++: no sample has stored more steps
        self.settled = False  # whether C++ has stopped every sample
        self.functions = functions
        self.address = at = self.arena.address  # the struct is the first part
        if S is not None:
            self.S = S
        if C is not None:
            self.C = C

        def part(name: str) -> int:
            return at + self.places[name][2]

        native.BROYDEN.pack_into(
            self.arena.lease, 0, B, D, capacity, coefficient_width(capacity), native.threads_for(B * D), relative, tol, floor,
            eta, part("S") if S is None else S.data_ptr(), part("C") if C is None else C.data_ptr(), part("best"), part("mark"),
            part("ceiling"), self.z_best.data_ptr(), part("n"), part("iterations"), part("stall"), part("done"),
            self.reports.data_ptr(), 0,
        )  # fmt: skip
        functions.start(at, z0.data_ptr(), part("z"))

    @property
    def struct(self) -> native.Broyden:
        return native.Broyden.from_address(self.address)

    @property
    def slots_written(self) -> int:  # type: ignore[override]
        return min(self.moves, self.capacity + 1)

    def alone(self) -> Factors:
        if self.grown:  # the first block may go
            return Factors(S=self.S, C=self.C, n=self.n.clone(), slots_written=self.slots_written, shared=self.shared)
        struct = self.struct
        struct.arena = self.arena  # or its memory would go where all tensors of it are empty
        return Factors(S=self.S, C=self.C, n=self.n, slots_written=self.slots_written, native=struct, shared=self.shared)

    def shaped(self, name: str, flat: Tensor) -> Tensor:
        B, D = self.z_best.shape
        if name == "S":
            return flat.view(B, self.capacity + 1, D)
        if name == "C":
            return flat.view(B, self.capacity, coefficient_width(self.capacity))
        return flat.view(B, D) if name == "z" else flat

    def _grow(self) -> None:
        """Room for twice as many updates."""
        S, C, self.grown = self.S, self.C, True
        self.capacity = min(2 * self.capacity, self.most)
        self.S, self.C = new_factors(self.z_best, self.capacity, S.dtype)
        self.S[:, : S.shape[1]] = S
        self.C[:, : C.shape[1], : C.shape[2]] = C
        self.C[:, : C.shape[1], C.shape[2] :] = 0  # C++ reads whole rows
        struct = self.struct
        struct.S, struct.C, struct.M, struct.ld = self.S.data_ptr(), self.C.data_ptr(), self.capacity, self.C.shape[2]

    def iterate(self, z0: Tensor) -> Tensor:
        return self.z

    def solve_info(self) -> Tensor:
        return self.reports if self.settled else super().solve_info()

    def all_converged(self) -> bool:
        struct = self.struct
        return struct.converged == struct.B if self.settled else super().all_converged()

    def _call(self, z: Tensor, f: Tensor, norms: Tensor | None, flags: int) -> None:
        if f.dtype != z.dtype or not f.is_contiguous():
            f = f.to(z.dtype).contiguous()
        if not z.is_contiguous():
            raise ValueError(f"expected z contiguous, got strides {z.stride()} for shape {tuple(z.shape)}")
        if norms is not None:
            norms = norms.to(z.dtype).contiguous()
        self.moves += 1
        if self.moves > self.capacity + 1 and self.capacity < self.most:  # one may lie in the last slot: the next needs another
            self._grow()
        norms_at = None if norms is None else norms.data_ptr()
        self.active = self.functions.step(self.address, z.data_ptr(), f.data_ptr(), norms_at, self.evaluations, flags)
        self.settled = not self.active

    def step(self, z: Tensor, f: Tensor, *, stop_norm: Tensor | None = None, last: bool = False) -> None:
        self.evaluations += 1
        self._call(z, f, stop_norm, _LAST if last else 0)

    def step_residual(self, z: Tensor, g: Tensor, stop_norm: Tensor, *, last: bool = False) -> None:
        self.evaluations += 1
        self._call(z, g, stop_norm, _RESIDUAL_GIVEN | (_LAST if last else 0))

    def step_preconditioned(self, z: Tensor, f: Tensor, moved: Tensor, *, last: bool = False) -> None:
        self.evaluations += 1
        self._call(z, f, moved, _PRECONDITIONED | (_LAST if last else 0))

    def advance(self, z: Tensor, g: Tensor) -> None:
        self._call(z, g, None, _RESIDUAL_GIVEN | _NO_OBSERVATION)


class CpuPlain(CpuState):
    """Plain iteration, z <- f(z), by the same C++: nothing is stored, and there are no factors."""

    def __init__(self, z0: Tensor, *, tol: float, relative: bool, floor: float, functions: native.Functions) -> None:
        nothing = z0.new_empty(0)
        super().__init__(z0, nothing, nothing, 0, 0, eta=0.0, tol=tol, relative=relative, floor=floor, functions=functions)

    def step(self, z: Tensor, f: Tensor, *, stop_norm: Tensor | None = None, last: bool = False) -> None:
        self.evaluations += 1
        self._call(z, f, stop_norm, _PLAIN | (_LAST if last else 0))


class CpuAnderson(CpuState):
    """Anderson acceleration by the same C++. `S` holds its window and `C` the window's Gram matrix; there are no factors."""

    def __init__(
        self, z0: Tensor, memory: int, damping: float, *, tol: float, relative: bool, floor: float, functions: native.Functions
    ) -> None:
        rows = 2 * memory - 1
        super().__init__(z0, None, None, rows, rows, eta=damping, tol=tol, relative=relative, floor=floor, functions=functions)

    def step(self, z: Tensor, f: Tensor, *, stop_norm: Tensor | None = None, last: bool = False) -> None:
        self.evaluations += 1
        self._call(z, f, stop_norm, _ANDERSON | (_LAST if last else 0))
