"""The forward solve, captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.broyden.gpu import TritonState
from deq_compile.region.body import Runner
from deq_compile.region.forward import FLOOR_EPS, Solution

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


class CapturedForward(Captured):
    """Broyden's iteration on one body: trips of [body, step]."""

    before: Callable[[], None] | None = None

    def __init__(
        self, device: Device, runner: Runner, z0: Tensor, operands: Operands, settings: ForwardSettings, wanted: str
    ) -> None:
        super().__init__(device, operands)
        self.runner = runner
        self.z = torch.empty_like(z0, memory_format=torch.contiguous_format)
        self.state = TritonState.for_capture(
            z0, settings.memory, settings.factor_dtype, eta=settings.eta, tol=settings.tol,
            relative=settings.stop_mode == "rel", floor=FLOOR_EPS * settings.body_eps, limit=settings.max_iter,
        )  # fmt: skip
        self.own: tuple[Tensor, Tensor] | None = None  # factors of solves that leave none
        S, C = self.state.buffers()

        def once() -> None:
            self.state.restart(self.z, z0.contiguous(), S, C)
            self.trip()

        self.build(self, once, settings.max_iter, wanted)

    def trip(self) -> None:
        self.state.step(self.z, self.runner.apply(self.z, self.operands.tensors))

    def solve(self, z0: Tensor, operands: Sequence[Tensor], leaves: bool) -> Solution | None:
        """Solve from z0 (B, D) as `region.forward.solve`; None where it cannot serve now. The outcome is not waited for, but
        where the engine has to. `leaves`: whether the factors are wanted afterwards, so that the next solve needs others."""
        if not self.enter(operands):
            return None
        assert self.engine is not None
        try:
            state = self.state
            if leaves:
                S, C = state.buffers()
            else:
                self.own = self.own or state.buffers()
                S, C = self.own
            state.restart(self.z, z0.contiguous(), S, C)
            if not self.launch():
                return None
            # The buffers are used again by the next solve.
            return Solution(
                z=state.z_best.clone(),
                state=Factors(S=S, C=C, n=state.n.clone(), high=S.shape[1]),
                status=state.done.clone(),
                iterations=state.iterations.clone(),
                residual=state.best.clone(),
                evaluations=0,
                outcome=self.engine.outcome,
            )
        finally:
            self.leave()


def captured_forward(
    key: tuple[object, ...], runner: Runner, z0: Tensor, operands: Sequence[Tensor], settings: ForwardSettings, wanted: str
) -> CapturedForward | Declined | None:
    """The captured solve for these shapes and settings; None where the loop serves (yet). `key` names the region and sizes."""
    return find(
        (*key, "forward", settings), z0, operands, wanted,
        lambda device, own: CapturedForward(device, runner, z0, own, settings, wanted),
    )  # fmt: skip
