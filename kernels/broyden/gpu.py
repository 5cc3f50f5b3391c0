"""Launching the Triton step: a state on the device, one or two launches an iteration, and a look at the host now and then."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..device import triton_kernels
from ..iteration import RUNNING
from ..precision import without_autocast
from ..recycle import products
from ..tiles import Tiles, offsets_fit, padded, power_of_two, tiles
from .state import BroydenState, Factors, coefficient_width, new_factors, row_width

NEVER = 2**31 - 1
SUMMARY = 4  # numbers that `summarise` writes


def launch(state: Any, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel; within `state.loading()` compile and load it only, within `state.idle()` not even that."""
    if state.idling:
        return
    if not state.only_load:
        kernel[grid](*args, **constants)
    elif (compiled := kernel.warmup(*args, grid=grid, **constants)) is not None:  # the interpreter compiles nothing
        compiled._init_handles()


class Held:
    """A launch outside a graph that comes again with every solve: of the compiled kernel itself, once there is one.

    `kernel[grid]` looks over its arguments each time, 12 us and more; a compiled kernel launches in 2. It was made for the first
    arguments: the others must have the same dtypes, integers of the same widths, and addresses at multiples of 16 bytes.
    """

    def __init__(self) -> None:
        self.compiled: Any = None

    def launch(self, kernel: Any, grid: tuple[int, int, int], *args: Any, num_warps: int, **constants: Any) -> None:
        """`args` and then `constants` are all that the kernel takes, in its order."""
        if self.compiled:
            try:
                self.compiled[grid](*args, *constants.values())
            except (AttributeError, TypeError):  # another Triton, with another launcher
                self.compiled = False
            else:
                return
        made = kernel[grid](*args, **constants, num_warps=num_warps)
        if self.compiled is None:
            self.compiled = made or False  # the interpreter compiles nothing


def summarise(state: Any, out: Tensor) -> None:
    """Enqueue what the kernel says about `state.done` and `state.iterations`. out: (4,) int32 in pinned memory."""
    kernels = triton_kernels("broyden")
    assert kernels is not None
    if (here := state.scratch.get("summary")) is None:
        here = state.scratch["summary"] = torch.zeros(SUMMARY, dtype=torch.int32, device=state.done.device)
    launch(state, kernels.summarise, (1,), state.done, state.iterations, here, state.done.shape[0], BB=256, num_warps=4)
    if not state.only_load:
        out.copy_(here, non_blocking=True)


def rows_of(B: int, count: int, like: Tensor, dtype: torch.dtype, value: float = 0) -> tuple[Tensor, ...]:
    """`count` rows (B,) of one tensor on the device of `like`, each at a multiple of 128 bytes."""
    return tuple(torch.full((count, padded(B)), value, dtype=dtype, device=like.device)[:, :B].unbind())


@dataclass(frozen=True)
class Outputs:
    """What a captured solve leaves to its caller: new tensors that its kernels find through the table.

    S, C      factors, as `new_factors` makes them
    z_best    (B, D) iterates
    ints      (3, padded(B)) int32: steps stored, evaluations, codes
    residual  (B,) compute dtype, of z_best
    solve_info  (B, 3) float32: residual, evaluations, code
    """

    S: Tensor
    C: Tensor
    z_best: Tensor
    ints: Tensor
    residual: Tensor
    solve_info: Tensor

    @property
    def addresses(self) -> tuple[int, ...]:
        """In the order of the table."""
        return tuple(t.data_ptr() for t in (self.S, self.C, self.z_best, self.ints, self.residual, self.solve_info))


@without_autocast
def judged(z: Tensor, f: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """What a preconditioned step is judged by, (2, padded(B)), and what it takes as `moved`; all (B, D) in the compute dtype."""
    B = z.shape[0]
    squares = z.new_zeros((2, padded(B)))
    for row, v in zip(squares, (f - z, f), strict=True):
        row[:B] = v.square().sum(1)
    return squares, torch.where(torch.isfinite(squares[0, :B])[:, None], moved, f)


class Launches:
    """What the launches of a state do: run, or less than that."""

    only_load: bool = False
    idling: bool = False

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Launches inside compile and load their kernels, and run nothing."""
        self.only_load = True
        try:
            yield
        finally:
            self.only_load = False

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """Launches inside do nothing: a graph has variants of its own, and these ones would be compiled for nothing."""
        self.idling = True
        try:
            yield
        finally:
            self.idling = False


@dataclass(kw_only=True, eq=False)
class TritonState(BroydenState, Launches):
    """A Broyden state that Triton kernels work on. Counters live on the device; `active` is what the host last saw.

    kernels     the module of kernels (triton_kernels, or its twin for the interpreter)
    sizes       M, the row length of C, and the row length of S
    poll_every  evaluations between two looks at the device; in between, samples that have stopped cost their body alone.
                0: never, for a loop whose end the device or a count decides
    form        "fused", "split", or None: by shape
    limit       cap on evaluations that the device itself watches; None: the host says when the last one is observed
    table       (6,) int64, addresses of `Outputs` that the kernels look up; None: those are passed. For captured graphs, which
                serve others in every solve; `S`, `C` and `z_best` then only say their dtypes
    handle      (1,) int64, the conditional handle of the WHILE node whose body the launches are; None: no such node
    ticket      (1,) int64, zero: where the programs of a launch vote about that node
    begins      the launch that begins a solve
    """

    kernels: Any
    sizes: tuple[int, int, int]
    poll_every: int = 4
    form: str | None = None
    limit: int | None = None
    table: Tensor | None = None
    handle: Tensor | None = None
    ticket: Tensor | None = None
    begins: Held = field(default_factory=Held)
    scratch: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def create(
        z0: Tensor, S: Tensor, C: Tensor, *, eta: float, tol: float, relative: bool, floor: float, kernels: Any
    ) -> TritonState:
        """No step stored yet; S and C are not read before they are written."""
        B = z0.shape[0]
        if not offsets_fit(S.shape[1], S.stride(1)):
            raise ValueError(f"expected fewer than 2**31 elements of steps a sample, got {S.shape[1]} x {S.stride(1)}")
        n, iterations, stall, done = rows_of(B, 4, z0, torch.int32)
        best, mark, ceiling = rows_of(B, 3, z0, z0.dtype, math.inf)  # the kernels find the ceilings behind the marks
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
        row = row_width(z0.shape[1], z0.device)
        if not offsets_fit(memory + 1, row):
            raise ValueError(f"expected fewer than 2**31 elements of steps a sample, got {memory + 1} x {row}")
        state.sizes = (memory, coefficient_width(memory), row)
        state.poll_every, state.limit = 0, limit
        state.table = torch.zeros(6, dtype=torch.int64, device=z0.device)
        state.ticket = torch.zeros(1, dtype=torch.int64, device=z0.device)
        return state

    def alone(self) -> Factors:
        # The kernels look at each sample's own n.
        return Factors(S=self.S, C=self.C, n=self.n, slots_written=self.S.shape[1], shared=self.shared)

    @property
    def memory(self) -> int:
        return self.sizes[0]

    def outputs(self, factors: tuple[Tensor, Tensor] | None = None) -> Outputs:
        """What another solve fills, of the sizes that the launches expect, uninitialised. `factors`: S and C to use again."""
        like, B = self.z_best, self.z_best.shape[0]
        S, C = factors or new_factors(like, self.sizes[0], self.S.dtype)
        return Outputs(
            S=S, C=C, z_best=torch.empty_like(like), ints=like.new_empty((3, padded(B)), dtype=torch.int32),
            residual=like.new_empty(B), solve_info=like.new_empty((B, 3), dtype=torch.float32),
        )  # fmt: skip

    def restart(self, z: Tensor, z0: Tensor, out: Outputs | None = None) -> None:
        """Begin another solve in the same buffers: z and the best iterate become z0 (both (B, D), contiguous). With a table,
        `out` is what the solve fills."""
        B, D = z.shape
        self.evaluations, self.active = 0, B
        if B == 0:
            return
        cut = self._tiles(B, D)
        addresses = (0,) * 6 if out is None else out.addresses
        if any(a % 16 for a in addresses):
            raise ValueError(f"expected outputs at multiples of 16 bytes, got addresses {addresses}")
        table = self.n if self.table is None else self.table
        z_best = self.z_best if out is None else out.z_best
        if z0.data_ptr() % 16:
            z0 = z0.clone()
        held = Held() if out is None else self.begins  # addresses are 64-bit numbers in the latter
        held.launch(
            self.kernels.start, (B, cut.slabs, 1), z0, z, z_best, self.n, self.best, self.mark, self.stall,
            self.iterations, self.done, table, *addresses, D, cut.slab, BD=1024, TABLE=self.table is not None, num_warps=4,
        )  # fmt: skip

    def summarise(self, out: Tensor) -> None:
        """Enqueue for the host: samples that still run, that missed their tolerance, most evaluations, missed in all launches.
        out: (4,) int32. With a table, each sample's numbers go to their outputs too."""
        B = self.done.shape[0]
        if self.table is not None and B:
            solve_info = self._buffer("solve_info", (1,), torch.float32)  # says a dtype
            launch(
                self, self.kernels.finish, (-(-B // 256),), self.n, self.best, self.iterations, self.done, solve_info, self.table,
                B, BB=256, num_warps=4,
            )  # fmt: skip
        summarise(self, out)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        found = self.scratch.get(name)
        if found is None or found.numel() < size or found.dtype != dtype:
            found = self.scratch[name] = torch.empty(size, dtype=dtype, device=self.done.device)
        return found

    def _launch(self, z: Tensor, f: Tensor, norm: Tensor | None, given: int, observe: bool, last: bool) -> None:
        """`given` is the kernels' GIVEN."""
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
            ticket = self.n if self.ticket is None else self.ticket
            y = self._buffer("y", (B, 3 * cut.BM + 2), self.C.dtype)
            launch(
                self, self.kernels.step_fused, (B,),
                z, f, norm, self.S, self.C, *counters, self.z_best, y, table, handle, ticket, D, row, LD, *limits,
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
        self._launch(z, f, stop_norm, given=0, observe=True, last=last)
        self._after(last)

    def step_residual(self, z: Tensor, g: Tensor, stop_norm: Tensor, *, last: bool = False) -> None:
        self.evaluations += 1
        self._launch(z, g.to(z.dtype), stop_norm, given=1, observe=True, last=last)
        self._after(last)

    def step_preconditioned(
        self, z: Tensor, f: Tensor, moved: Tensor, *, squares: Tensor | None = None, last: bool = False
    ) -> None:
        """`squares` (2, padded(B)): |f - z|^2 and |f|^2, where whoever made `moved` has them; in rows where that is not finite
        `moved` then has f. None: they are made here."""
        if squares is None:
            squares, moved = judged(z, f.to(z.dtype), moved)
        self.evaluations += 1
        self._launch(z, moved, squares, given=2, observe=True, last=last)
        self._after(last)

    def step_shared(self, z: Tensor, f: Tensor, *, last: bool = False) -> bool:
        """:meth:`step_preconditioned` by `shared`; False, and nothing done, where no kernel takes it."""
        assert self.spare is not None
        if self.products is None:
            self.products = None if self.shared is None else products(self.shared, z)
            if self.products is None:
                return False
        squares = self.products.residual(f, z, self.done, self.spare, functools.partial(launch, self))
        self.step_preconditioned(z, f, self.spare, squares=squares, last=last)
        return True

    def advance(self, z: Tensor, g: Tensor) -> None:
        self._launch(z, g.to(z.dtype), None, given=1, observe=False, last=False)
