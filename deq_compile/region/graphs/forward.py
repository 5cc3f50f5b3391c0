"""The forward solve, captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.broyden.gpu import Outputs, TritonState
from deq_compile.kernels.broyden.state import row_width
from deq_compile.kernels.recycle import Shared, products, serves
from deq_compile.kernels.tiles import offsets_fit
from deq_compile.region.body import Runner
from deq_compile.region.forward import Solution
from deq_compile.region.solvers import FLOOR_EPS

from .captured import Captured, Declined
from .captures import find
from .device import Device
from .operands import Operands


@dataclass(frozen=True)
class ForwardSettings:
    """What a captured forward solve has built in."""

    tol: float
    stop_mode: str
    max_iter: int
    memory: int
    factor_dtype: torch.dtype
    body_eps: float
    eta: float = 0.1
    rank: int = 0  # of the shared inverse that solves begin with; 0: none


class Ended:
    """What a captured solve says of each sample, once it has ended; tensors of its own, read by whoever asks.

    done, iterations  (B,) int32, as in :class:`~deq_compile.kernels.broyden.state.Progress`
    best              (B,) stopping residual
    """

    evaluations = 0  # only the device knows

    def __init__(self, out: Outputs) -> None:
        self.ints, self.best, self._solve_info = out.ints, out.residual, out.solve_info

    def _row(self, number: int) -> Tensor:
        return self.ints.as_strided((self.best.shape[0],), (1,), number * self.ints.shape[1])

    @property
    def steps(self) -> Tensor:
        return self._row(0)

    @property
    def iterations(self) -> Tensor:
        return self._row(1)

    @property
    def done(self) -> Tensor:
        return self._row(2)

    def solve_info(self) -> Tensor:
        return self._solve_info

    def all_converged(self) -> bool:
        """False: nobody has asked the device."""
        return False


class CapturedForward(Captured):
    """Broyden's iteration on one body: trips of [body, step]. A shared inverse is copied in by each call, as an operand is."""

    before: Callable[[], None] | None = None

    def __init__(
        self, device: Device, runner: Runner, z0: Tensor, operands: Operands, settings: ForwardSettings, wanted: str,
        shared: Shared | None = None,
    ) -> None:  # fmt: skip
        super().__init__(device, operands)
        self.runner = runner
        self.z = torch.empty_like(z0, memory_format=torch.contiguous_format)
        self.state = TritonState.for_capture(
            z0, settings.memory, settings.factor_dtype, eta=settings.eta, tol=settings.tol,
            relative=settings.stop_mode == "rel", floor=FLOOR_EPS * settings.body_eps, limit=settings.max_iter,
        )  # fmt: skip
        if shared is not None and (made := products(shared, self.z)) is not None:
            self.state.products, self.state.spare = made.own(), torch.empty_like(self.z)
        self.own: tuple[Tensor, Tensor] | None = None  # factors of solves that leave none
        out = self.state.outputs()  # lives as long as something may be launched that finds it through the table

        def once() -> None:
            self.state.restart(self.z, z0.contiguous(), out)
            with self.state.idle():
                self.trip()

        self.build(self, once, settings.max_iter, wanted)

    def trip(self) -> None:
        f = self.runner.apply(self.z, self.operands.tensors)
        if self.state.products is None:
            self.state.step(self.z, f)
        else:
            self.state.step_shared(self.z, f)

    def solve(self, z0: Tensor, operands: Sequence[Tensor], leaves: bool, shared: Shared | None = None) -> Solution | None:
        """Solve from z0 (B, D) as `region.forward.solve`; None where it cannot serve now. The outcome is not waited for, but
        where the engine has to. `leaves`: whether the factors are wanted afterwards, so that the next solve needs others.
        `shared`: what it begins with, of the rank that was captured."""
        if not self.enter(operands):
            return None
        assert self.engine is not None
        try:
            state = self.state
            if shared is not None and state.products is not None:
                state.products.load(shared)
            out = state.outputs(None if leaves else self.own)
            if not leaves:
                self.own = out.S, out.C
            state.restart(self.z, z0.contiguous(), out)
            outcome = self.engine
            if not self.launch():
                return None
            ended = Ended(out)
            factors = Factors(S=out.S, C=out.C, n=ended.steps, slots_written=out.S.shape[1], shared=shared)
            return Solution.of(ended, factors, z=out.z_best, outcome=outcome)
        finally:
            self.leave()


def captured_forward(
    key: tuple[object, ...], runner: Runner, z0: Tensor, operands: Sequence[Tensor], settings: ForwardSettings, wanted: str,
    shared: Shared | None = None,
) -> CapturedForward | Declined | None:  # fmt: skip
    """The captured solve for these shapes and settings; None where the loop serves (yet). `key` names the region and sizes."""
    if shared is not None:
        if not serves(shared, z0):
            return None
        settings = replace(settings, rank=shared.rank)
    if not offsets_fit(settings.memory + 1, row_width(z0.shape[1], z0.device)):
        return None
    return find(
        (*key, "forward", settings), z0, operands, wanted,
        lambda device, own: CapturedForward(device, runner, z0, own, settings, wanted, shared),
    )  # fmt: skip
