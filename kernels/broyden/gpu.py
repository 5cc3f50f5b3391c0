"""Launching the Triton step: a state on the device, one or two launches an iteration, and a look at the host now and then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..tiles import Tiles, power_of_two, tiles
from .state import RUNNING, BroydenState

NEVER = 2**31 - 1


@dataclass(kw_only=True, eq=False)
class TritonState(BroydenState):
    """A Broyden state that Triton kernels work on. Counters live on the device; `active` is what the host last saw.

    kernels     the module of kernels (triton_kernels, or its twin for the interpreter)
    poll_every  evaluations between two looks at the device; in between, samples that have stopped cost their body alone
    form        "fused", "split", or None: by shape
    """

    kernels: Any
    poll_every: int = 4
    form: str | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def create(
        z0: Tensor, S: Tensor, C: Tensor, *, eta: float, tol: float, relative: bool, floor: float, kernels: Any
    ) -> TritonState:
        B = z0.shape[0]
        counts = torch.zeros((4, B), dtype=torch.int32, device=z0.device)
        n, iterations, stall, done = counts.unbind()
        best, mark = z0.new_full((2, B), torch.inf).unbind()
        return TritonState(
            S=S, C=C, n=n, done=done, best=best, z_best=z0.clone(memory_format=torch.contiguous_format),
            iterations=iterations, mark=mark, stall=stall, tol=tol, relative=relative, floor=floor, active=B, eta=eta,
            kernels=kernels,
        )  # fmt: skip

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = 1
        for s in shape:
            size *= s
        found = self.scratch.get(name)
        if found is None or found.numel() < size or found.dtype != dtype:
            found = self.scratch[name] = torch.empty(size, dtype=dtype, device=self.C.device)
        return found

    def _launch(self, z: Tensor, f: Tensor, norm: Tensor | None, given: bool, observe: bool, last: bool) -> None:
        import triton.language as tl

        B, D = z.shape
        if B == 0:
            return
        if not z.is_contiguous():
            raise ValueError(f"expected z contiguous, got strides {z.stride()} for shape {tuple(z.shape)}")
        f = f.contiguous()
        M, LD, row = self.memory, self.C.shape[2], self.S.stride(1)
        cut = self._tiles(B, D)
        acc = tl.float64 if z.dtype == torch.float64 else tl.float32
        norm = self.best if norm is None else norm.to(z.dtype).contiguous()
        max_iter = self.evaluations if last else NEVER
        y = self._buffer("y", (B, cut.slabs, cut.BM), self.C.dtype)
        counters = (self.n, self.best, self.mark, self.stall, self.iterations, self.done)
        options = {"RELATIVE": self.relative, "GIVEN": given, "OBSERVE": observe, "ACC": acc, "num_warps": cut.warps}
        limits = (float(self.tol), float(self.floor), float(self.eta), max_iter)
        if cut.slabs == 1:
            self.kernels.step_fused[(B,)](
                z, f, norm, self.S, self.C, *counters, self.z_best, y, D, row, LD, *limits,
                M=M, BM=cut.BM, BD=cut.BD, BD2=cut.BD2, STAGES=cut.stages, **options,
            )  # fmt: skip
            return
        parts = self._buffer("parts", (B, cut.slabs, 2 * cut.BM + 2), self.C.dtype)
        ints = self._buffer("ints", (B, 4), torch.int32)
        floats = self._buffer("floats", (B, 2), self.C.dtype)
        pending = self._buffer("pending", (B,), self.C.dtype)
        self.kernels.dots[(B, cut.slabs)](
            z, f, self.S, self.C, *counters, parts, ints, floats, pending, D, row, LD, cut.slab,
            M=M, BM=cut.BM, BD=cut.BD, STAGES=cut.stages, GIVEN=given, ACC=acc, num_warps=cut.warps,
        )  # fmt: skip
        self.kernels.combine[(B, cut.slabs)](
            z, f, norm, self.S, self.C, *counters, self.z_best, y, parts, ints, floats, pending, D, row, LD, cut.slab,
            cut.slabs, *limits, M=M, BM=cut.BM, BP=power_of_two(cut.slabs), BD=cut.BD2,
            **{**options, "num_warps": cut.update_warps},
        )  # fmt: skip

    def _tiles(self, B: int, D: int) -> Tiles:
        steps = min(self.count + 1, self.memory + 1)
        cut = tiles(B, D, steps, self.C.element_size())
        if self.form is None or (self.form == "fused") == (cut.slabs == 1):
            return cut
        if self.form == "fused":
            return Tiles(cut.BM, cut.BD, cut.BD2, 1, D, cut.stages, cut.warps)
        slab = max((D // 3 + 15) // 16 * 16, 16)
        return Tiles(cut.BM, cut.BD, cut.BD2, -(-D // slab), slab, cut.stages, cut.warps)

    def _after(self, last: bool) -> None:
        self.count = min(self.count + 1, self.memory + 1)  # an upper bound of n, without asking the device
        if last or self.evaluations % self.poll_every == 0:
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
        self._after(False)


