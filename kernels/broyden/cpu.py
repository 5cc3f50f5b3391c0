"""The fused C++ step: one call an iteration, every sample with its own number of stored steps."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import native, workspace
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


@functools.lru_cache(maxsize=256)
def _plan(B: int, D: int, memory: int, dtype: torch.dtype, S: bool, C: bool) -> tuple[dict[str, workspace.Place], int]:
    """Where the parts of a state lie. S and C: whether the factors are among them."""
    parts = [
        ("struct", torch.uint8, native.BROYDEN.size), ("best", dtype, B), ("mark", dtype, B),
        ("iterations", torch.int32, B), ("stall", torch.int32, B), ("done", torch.int8, B), ("z", dtype, B * D),
    ]  # fmt: skip
    if C:
        parts.append(("C", dtype, B * memory * coefficient_width(memory)))
    if S:
        parts.append(("S", dtype, B * (memory + 1) * D))  # last: most of it is never written, and costs no memory then
    return workspace.plan(parts)


class CpuState(native.Parts, BroydenState):
    """A Broyden state that C++ works on. `count`, `high` and `guarded` of the lockstep implementation are not used."""

    def __init__(
        self, z0: Tensor, S: Tensor | None, C: Tensor | None, memory: int, *, eta: float, tol: float, relative: bool,
        floor: float, functions: native.Functions,
    ) -> None:  # fmt: skip
        """No step stored yet. S and C may be flat; all is uninitialised before, and filled by C++."""
        B, D = z0.shape
        z0 = z0.contiguous()
        self.places, size = _plan(B, D, memory, z0.dtype, S is None, C is None)
        self.arena = workspace.Arena(size)
        self.z_best = torch.empty_like(z0)
        self.n, self.reports = torch.empty(B, dtype=torch.int32), torch.empty((B, 2))
        self.given, self.shape = (S, C), (B, memory, D)
        self.eta, self.tol, self.relative, self.floor, self.active = eta, tol, relative, floor, B
        self.settled = False  # whether C++ has stopped every sample
        self.functions = functions
        self.address = at = self.arena.address  # the struct is the first part

        def part(name: str) -> int:
            return at + self.places[name][2]

        native.BROYDEN.pack_into(
            self.arena.lease, 0, B, D, memory, coefficient_width(memory), native.threads_for(B * D), relative, tol, floor, eta,
            part("S") if S is None else S.data_ptr(), part("C") if C is None else C.data_ptr(), part("best"), part("mark"),
            self.z_best.data_ptr(), self.n.data_ptr(), part("iterations"), part("stall"), part("done"), self.reports.data_ptr(),
            0,
        )  # fmt: skip
        functions.start(at, z0.data_ptr(), part("z"))

    @property
    def struct(self) -> native.Broyden:
        return native.Broyden.from_address(self.address)

    def __getattr__(self, name: str) -> Tensor:
        if name in ("S", "C"):
            B, memory, D = self.shape
            self.S, self.C = shaped_buffers(*self.flat(), B, D, memory)
            return self.S if name == "S" else self.C
        return super().__getattr__(name)

    def shaped(self, name: str, flat: Tensor) -> Tensor:
        return flat.view(self.z_best.shape) if name == "z" else flat

    def flat(self) -> tuple[Tensor, Tensor]:
        S, C = self.given
        return self.arena.tensor(self.places["S"]) if S is None else S, self.arena.tensor(self.places["C"]) if C is None else C

    def iterate(self, z0: Tensor) -> Tensor:
        return self.z

    def about(self) -> Tensor:
        return self.reports if self.settled else super().about()

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
