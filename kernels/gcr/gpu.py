"""Launching the adjoint iteration in Triton: three launches between two VJPs, nothing asked of the device in between."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..broyden.gpu import NEVER, Launches, launch, rows_of, summarise
from ..broyden.state import row_width
from ..iteration import RUNNING
from ..recycle import Products, Shared, products
from ..reuse.multisecant import Multisecant
from ..tiles import Tiles, offsets_fit, power_of_two, tiles
from .state import DEPENDENT_EPS, GcrState

# `extend` holds two rows of the update beside the tiles of the dot products: more warps, so that nothing spills.
EXTEND_COLUMNS, EXTEND_WARPS = 1024, 8


def extend_columns(cut: Tiles) -> int:
    """Of `extend`'s dot products. With the 512 columns of few steps ptxas holds it to 64 registers on sm_80, and spills."""
    return min(cut.BD, 256)


def project_columns(cut: Tiles) -> int:
    """`project` loads five vectors beside the tile of images: half the columns of other dot products."""
    return max(cut.BD // 2, 16)


@dataclass(kw_only=True, eq=False)
class TritonGcr(GcrState, Launches):
    """An adjoint iteration that Triton kernels work on. What the host knows of it is what it last asked.

    kernels     the module of kernels
    outcome     (2,) residual of the batch at the last VJP, and 1 where that ended the iteration; compute dtype
    poll_every  VJPs between two looks at the device; 0: never
    limit, table, handle   as in :class:`~..broyden.gpu.TritonState`; the table holds the address of S
    products    with `shared`; None: without, or in ATen
    """

    kernels: Any
    outcome: Tensor
    norm_of_batch: Tensor
    row: int
    gram: Tensor
    squares: Tensor
    poll_every: int = 4
    limit: int | None = None
    table: Tensor | None = None
    handle: Tensor | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    slots: tuple[int, int] = (1, 16)
    products: Products | None = None

    @staticmethod
    def create(
        q: Tensor, operator: Multisecant | None, memory: int, tol: float, floor: float, kernels: Any, *, begin: bool = True
    ) -> TritonGcr:
        """The iteration before its first VJP. With `begin=False` nothing is computed yet: `restart` does that."""
        B, D = q.shape
        device, row = q.device, row_width(D, q.device)
        if not offsets_fit(2 * memory, row):
            raise ValueError(f"expected fewer than 2**31 elements of a basis a sample, got 2 x {memory} x {row}")
        n, iterations, stall, done = rows_of(B, 4, q, torch.int32)
        best, mark, norms, residuals = rows_of(B, 4, q, q.dtype)
        z_best, x, r, w, true_residual = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(5))
        if operator is None:
            nothing = q.new_empty((1, 1, 16))
            operator = Multisecant(S=nothing, V=nothing, n=torch.zeros(B, dtype=torch.int32, device=device), slots_written=0)
        found = TritonGcr(
            done=done, best=best, z_best=z_best, iterations=iterations, mark=mark, stall=stall,
            ceiling=q.new_full((B,), math.inf), tol=tol, relative=True,
            floor=floor, active=B, q=q, norms=norms, batch_norm=0.0, operator=operator, x=x, r=r, w=w,
            basis=q.new_empty((B, 2, memory, row)), n=n, true_residual=true_residual, residuals=residuals, kernels=kernels,
            outcome=q.new_zeros(2), norm_of_batch=q.new_zeros(1), row=row, gram=q.new_empty((B, memory, memory)),
            squares=q.new_empty((B, memory)),
        )  # fmt: skip
        if operator.slots_written:
            found.slots = (operator.S.shape[1], operator.S.stride(1))
        if begin:
            found.restart()
        return found

    def begin_with(self, shared: Shared) -> bool:
        """Put P before M in every trial, the first one included, which is there already; False where no kernel takes it."""
        self.products = products(shared, self.q)
        if self.products is None:
            return False
        self._precede()
        return True

    def _precede(self) -> None:
        if self.products is not None:
            self.products.onto(self.x, self.w, self.done, functools.partial(launch, self))

    def forget_steps(self) -> None:
        """With a table: keep no steps alive, only their dtype and strides."""
        assert self.operator is not None
        self.operator = replace(self.operator, S=self.operator.S.new_empty((1, 1, 16)))

    def restart(self) -> None:
        """Begin with the cotangents in `q` and the operator as they are now: x = 0, r = q, w = M q. Enqueued, never waiting."""
        self.evaluations, self.active, self.converged = 0, self.done.shape[0], False
        for counter in (self.n, self.iterations, self.stall, self.done):
            counter.zero_()
        self.best.fill_(math.inf)
        self.mark.fill_(math.inf)
        torch.linalg.vector_norm(self.q, dim=1, out=self.norms)
        torch.linalg.vector_norm(self.norms, dim=0, keepdim=True, out=self.norm_of_batch)
        self.x.zero_()
        self.r.copy_(self.q)
        self.z_best.copy_(self.q)
        self._launch(None, last=False)

    def _buffer(self, name: str, size: int) -> Tensor:
        dtype = torch.int32 if name == "ints" else self.q.dtype
        found = self.scratch.get(name)
        if found is None or found.numel() < size:
            found = self.scratch[name] = torch.empty(size, dtype=dtype, device=self.q.device)
        return found

    def _launch(self, jw: Tensor | None, last: bool) -> None:
        """The three launches of a step; without `jw` the two that make the first trial."""
        import triton.language as tl

        (B, D), M = self.q.shape, self.memory
        if B == 0:
            return
        operator = self.operator
        assert operator is not None
        slots, s_row = self.slots
        own, steps = tiles(B, D, M, self.q.element_size()), tiles(B, D, slots, self.q.element_size())
        slabs, slab, BP = steps.slabs, steps.slab, power_of_two(steps.slabs)
        acc = tl.float64 if self.q.dtype == torch.float64 else tl.float32
        table = self.n if self.table is None else self.table
        handle = self.n if self.handle is None else self.handle
        constants = {"SLOTS": slots, "BM": steps.BM, "INDIRECT": self.table is not None, "ACC": acc, "num_warps": steps.warps}
        cond, k = self.handle is not None, self.kernels
        part2 = self._buffer("part2", B * slabs * (2 * steps.BM + 2))
        squares, ints = self._buffer("squares", 2 * B * slabs), self._buffer("ints", 4 * B)
        if jw is None:
            launch(
                self, k.begin, (B, slabs), self.q, operator.S, operator.n, table, part2, D, s_row, slab,
                BD=steps.BD, STAGES=steps.stages, **constants,
            )  # fmt: skip
        else:
            part, floats = self._buffer("part", B * slabs * 2 * own.BM), self._buffer("floats", 2 * B)
            counters = (self.best, self.mark, self.stall, self.iterations, self.done)
            max_iter = self.limit if self.limit is not None else self.evaluations if last else NEVER
            launch(
                self, k.project, (B, slabs), self.q, jw, self.w, self.r, self.true_residual, self.basis, self.n, *counters, part,
                squares, ints, floats, handle, D, self.row, slab,
                M=M, BK=own.BM, BD=project_columns(own), STAGES=own.stages, COND=cond, ACC=acc, num_warps=own.warps,
            )  # fmt: skip
            launch(
                self, k.extend, (B, slabs), self.w, self.x, self.r, self.true_residual, self.basis, operator.S, operator.n, table,
                self.norms, self.norm_of_batch, *counters, self.z_best, self.residuals, self.outcome, self.gram, self.squares,
                self._buffer("c", B * slabs * own.BM), part, squares, part2, ints, floats, handle, D, self.row, s_row, slab,
                float(self.tol), float(self.floor), max_iter,
                M=M, BK=own.BM, BP=BP, BD=extend_columns(steps), BD2=EXTEND_COLUMNS, STAGES=steps.stages, COND=cond,
                **{**constants, "num_warps": EXTEND_WARPS},
            )  # fmt: skip
        launch(
            self, k.advance, (B, slabs), self.w, self.x, self.r, self.true_residual, self.basis, operator.S, operator.V,
            operator.n, table, self.n, self.done, self._buffer("d", 2 * B * slabs * steps.BM), part2, squares, ints, D, self.row,
            s_row, operator.V.shape[2], slab, DEPENDENT_EPS * torch.finfo(self.q.dtype).eps,
            M=M, BP=BP, BD=steps.BD2, FIRST=jw is None, **constants,
        )  # fmt: skip
        self._precede()

    def unwatched(self) -> None:
        self.poll_every = 0

    @property
    def needed(self) -> int:
        return int(self.iterations.max()) if self.iterations.numel() else self.evaluations

    def move(self, jw: Tensor, last: bool, look: bool) -> None:
        self.evaluations += 1
        self._launch(jw.contiguous(), last)
        if self.poll_every and (last or look or self.evaluations % self.poll_every == 0):
            self.look()
        elif last:
            self.active = 0

    def look(self) -> None:
        """Ask the device how far it is."""
        if not self.done.numel():
            self.active, self.batch, self.converged = 0, 0.0, True
            return
        running = (self.done == RUNNING).sum()
        self.batch, ended, active = torch.cat([self.outcome, running[None].to(self.outcome.dtype)]).tolist()
        self.active, self.converged = int(active), bool(ended)

    def summarise(self, out: Tensor) -> None:
        """Enqueue for the host: samples that still run, that missed their tolerance, most VJPs, missed in all launches. out: (4,)
        int32."""
        summarise(self, out)
