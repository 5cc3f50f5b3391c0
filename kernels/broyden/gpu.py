"""Launching the Triton step: a state on the device, one or two launches an iteration, and a look at the host now and then."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..device import triton_kernels
from ..tiles import Tiles, power_of_two, tiles
from .state import RUNNING, BroydenState, Factors, coefficient_width, new_factors, row_width

NEVER = 2**31 - 1


def launch(state: Any, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel; within `state.loading()` compile and load it only."""
    if not state.only_load:
        kernel[grid](*args, **constants)
    elif (compiled := kernel.warmup(*args, grid=grid, **constants)) is not None:  # the interpreter compiles nothing
        compiled._init_handles()


def summarise(state: Any, out: Tensor) -> None:
    """Enqueue three numbers about `state.done` and `state.iterations`; see the kernel. out: (3,) int32 in pinned memory."""
    kernels = triton_kernels("broyden")
    assert kernels is not None
    if (here := state.scratch.get("summary")) is None:
        here = state.scratch["summary"] = torch.empty(3, dtype=torch.int32, device=state.done.device)
    launch(state, kernels.summarise, (1,), state.done, state.iterations, here, state.done.shape[0], BB=256, num_warps=4)
    if not state.only_load:
        out.copy_(here, non_blocking=True)


@dataclass(kw_only=True, eq=False)
class TritonState(BroydenState):
    """A Broyden state that Triton kernels work on. Counters live on the device; `active` is what the host last saw.

    kernels     the module of kernels (triton_kernels, or its twin for the interpreter)
    sizes       M, the row length of C, and the row length of S
    poll_every  evaluations between two looks at the device; in between, samples that have stopped cost their body alone.
                0: never, for a loop whose end the device or a count decides
    form        "fused", "split", or None: by shape
    limit       cap on evaluations that the device itself watches; None: the host says when the last one is observed
    table       (2,) int64, addresses of S and C that the kernels look up; None: S and C are passed. For captured graphs, which
                serve other S and C in every solve; `S` and `C` then only say their dtypes
    handle      (1,) int64, the conditional handle of the WHILE node whose body the launches are; None: no such node
    """

    kernels: Any
    sizes: tuple[int, int, int]
    poll_every: int = 4
    form: str | None = None
    limit: int | None = None
    table: Tensor | None = None
    handle: Tensor | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    only_load: bool = False

    @staticmethod
    def create(
        z0: Tensor, S: Tensor, C: Tensor, *, eta: float, tol: float, relative: bool, floor: float, kernels: Any
    ) -> TritonState:
        """No step stored yet; S and C are not read before they are written."""
        B = z0.shape[0]
        counts = torch.zeros((4, B), dtype=torch.int32, device=z0.device)
        n, iterations, stall, done = counts.unbind()
        best, mark, ceiling = z0.new_full((3, B), torch.inf).unbind()  # the kernels find the ceilings behind the marks
        return TritonState(
            S=S, C=C, n=n, done=done, best=best, z_best=z0.clone(memory_format=torch.contiguous_format),
            iterations=iterations, mark=mark, stall=stall, ceiling=ceiling, tol=tol, relative=relative, floor=floor, active=B,
            eta=eta,
            kernels=kernels, sizes=(C.shape[1], C.shape[2], S.stride(1)),
        )  # fmt: skip

    @staticmethod
    def for_capture(
        z0: Tensor, memory: int, factor_dtype: torch.dtype, *, eta: float, tol: float, relative: bool, floor: float, limit: int
    ) -> TritonState:
        """A state whose launches may be captured: each solve begins with `restart`, which says where its S and C lie."""
        kernels = triton_kernels("broyden")
        S, C = z0.new_empty((1, 1, 16), dtype=factor_dtype), z0.new_empty((1, 1, 16))
        state = TritonState.create(z0, S, C, eta=eta, tol=tol, relative=relative, floor=floor, kernels=kernels)
        state.sizes = (memory, coefficient_width(memory), row_width(z0.shape[1], z0.device))
        state.poll_every, state.limit = 0, limit
        state.table = torch.zeros(2, dtype=torch.int64, device=z0.device)
        return state

    def alone(self) -> Factors:
        return Factors(S=self.S, C=self.C, n=self.n, high=self.S.shape[1])  # the kernels look at each sample's own n

    @property
    def memory(self) -> int:
        return self.sizes[0]

    def buffers(self) -> tuple[Tensor, Tensor]:
        """S and C of the sizes that the launches expect, uninitialised."""
        return new_factors(self.z_best, self.sizes[0], self.S.dtype)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Launches inside compile and load their kernels, and run nothing."""
        self.only_load = True
        try:
            yield
        finally:
            self.only_load = False

    def restart(self, z: Tensor, z0: Tensor, S: Tensor | None = None, C: Tensor | None = None) -> None:
        """Begin another solve in the same buffers: z and the best iterate become z0 (both (B, D), contiguous). With a table,
        `S` and `C` are the tensors that the solve fills."""
        B, D = z.shape
        self.evaluations, self.active = 0, B
        if B == 0:
            return
        cut = self._tiles(B, D)
        addresses = (0, 0) if S is None or C is None else (S.data_ptr(), C.data_ptr())
        if any(a % 16 for a in addresses):
            raise ValueError(f"expected S and C at multiples of 16 bytes, got addresses {addresses}")
        table = self.n if self.table is None else self.table
        launch(
            self, self.kernels.start, (B, cut.slabs), z0, z, self.z_best, self.n, self.best, self.mark, self.stall,
            self.iterations, self.done, table, *addresses, D, cut.slab, BD=1024, TABLE=self.table is not None, num_warps=4,
        )  # fmt: skip

    def summarise(self, out: Tensor) -> None:
        """Enqueue for the host: samples that still run, that missed their tolerance, most evaluations. out: (3,) int32."""
        summarise(self, out)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        found = self.scratch.get(name)
        if found is None or found.numel() < size or found.dtype != dtype:
            found = self.scratch[name] = torch.empty(size, dtype=dtype, device=self.done.device)
        return found

    def _launch(self, z: Tensor, f: Tensor, norm: Tensor | None, given: bool, observe: bool, last: bool) -> None:
        import triton.language as tl

        B, D = z.shape
        if B == 0:
            return
        if not z.is_contiguous():
            raise ValueError(f"expected z contiguous, got strides {z.stride()} for shape {tuple(z.shape)}")
        f = f.contiguous()
        M, LD, row = self.sizes
        cut = self._tiles(B, D)
        acc = tl.float64 if z.dtype == torch.float64 else tl.float32
        norm = self.best if norm is None else norm.to(z.dtype).contiguous()
        max_iter = self.limit if self.limit is not None else self.evaluations if last else NEVER
        counters = (self.n, self.best, self.mark, self.stall, self.iterations, self.done)
        # What a constant switches off still needs an argument.
        table = self.n if self.table is None else self.table
        handle = self.n if self.handle is None else self.handle
        where = {"INDIRECT": self.table is not None, "COND": self.handle is not None, "ACC": acc}
        options = {"RELATIVE": self.relative, "GIVEN": given, "OBSERVE": observe, **where}
        limits = (float(self.tol), float(self.floor), float(self.eta), max_iter)
        if cut.slabs == 1:
            if self.handle is not None:
                launch(self, self.kernels.stop_looping, (1,), self.handle, num_warps=1)
            y = self._buffer("y", (B, 3 * cut.BM + 2), self.C.dtype)
            launch(
                self, self.kernels.step_fused, (B,),
                z, f, norm, self.S, self.C, *counters, self.z_best, y, table, handle, D, row, LD, *limits,
                M=M, BM=cut.BM, BD=cut.BD, BD2=cut.BD2, STAGES=cut.stages, num_warps=cut.warps, **options,
            )  # fmt: skip
            return
        y = self._buffer("y", (B, cut.slabs, 2 * cut.BM), self.C.dtype)
        parts = self._buffer("parts", (B, cut.slabs, 2 * cut.BM + 2), self.C.dtype)
        ints = self._buffer("ints", (B, 4), torch.int32)
        floats = self._buffer("floats", (B, 3), self.C.dtype)
        pending = self._buffer("pending", (B,), self.C.dtype)
        launch(
            self, self.kernels.dots, (B, cut.slabs),
            z, f, self.S, self.C, *counters, parts, ints, floats, pending, table, handle, D, row, LD, cut.slab,
            M=M, BM=cut.BM, BD=cut.BD, STAGES=cut.stages, GIVEN=given, num_warps=cut.warps, **where,
        )  # fmt: skip
        launch(
            self, self.kernels.combine, (B, cut.slabs),
            z, f, norm, self.S, self.C, *counters, self.z_best, y, parts, ints, floats, pending, table, handle, D, row, LD,
            cut.slab, cut.slabs, *limits, M=M, BM=cut.BM, BP=power_of_two(cut.slabs), BD=cut.BD2, num_warps=cut.warps, **options,
        )  # fmt: skip

    def _tiles(self, B: int, D: int) -> Tiles:
        cut = tiles(B, D, self.memory + 1, self.C.element_size())
        if self.form is None or (self.form == "fused") == (cut.slabs == 1):
            return cut
        if self.form == "fused":
            return Tiles(cut.BM, cut.BD, cut.BD2, 1, D, cut.stages, cut.warps)
        slab = max((D // 2 + 15) // 16 * 16, 16)
        return Tiles(cut.BM, cut.BD, cut.BD2, -(-D // slab), slab, cut.stages, cut.warps)

    def unwatched(self) -> None:
        self.poll_every = 0

    def _after(self, last: bool) -> None:
        if self.poll_every == 0:
            self.active = 0 if last else self.active
        elif last or self.evaluations % self.poll_every == 0:
            self.active = int((self.done == RUNNING).sum())

    def step(self, z: Tensor, f: Tensor, *, stop_norm: Tensor | None = None, last: bool = False) -> None:
        self.evaluations += 1
        self._launch(z, f, stop_norm, given=False, observe=True, last=last)
        self._after(last)

    def step_residual(self, z: Tensor, g: Tensor, stop_norm: Tensor, *, last: bool = False) -> None:
        self.evaluations += 1
        self._launch(z, g.to(z.dtype), stop_norm, given=True, observe=True, last=last)
        self._after(last)

    def advance(self, z: Tensor, g: Tensor) -> None:
        self._launch(z, g.to(z.dtype), None, given=True, observe=False, last=False)
