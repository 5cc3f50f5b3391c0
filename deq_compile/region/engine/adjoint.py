"""The adjoint solve, captured: linearise, then trips of [VJP, move]; the operands' gradients are taken at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.device import triton_kernels
from deq_compile.kernels.gcr.gpu import TritonGcr
from deq_compile.kernels.reuse import multisecant
from deq_compile.kernels.reuse.multisecant import Multisecant
from deq_compile.region.adjoint import MEMORY, AdjointSolution, certified_at, choose
from deq_compile.region.body import EagerRunner, Linearised, Runner
from deq_compile.region.forward import FLOOR_EPS

from .captured import Captured, Declined
from .captures import find
from .device import Device
from .operands import Operands


@dataclass(frozen=True)
class AdjointSettings:
    """What a captured adjoint solve has built in."""

    tol: float
    max_iter: int
    body_eps: float
    skip: int


class CapturedAdjoint(Captured):
    """The adjoint iteration on one linearised body."""

    def __init__(
        self, device: Device, runner: Runner, z: Tensor, operands: Operands, needs: tuple[bool, ...], factors: Factors | None,
        settings: AdjointSettings, wanted: str,
    ) -> None:  # fmt: skip
        super().__init__(device, operands)
        self.runner, self.needs, self.settings = runner, needs, settings
        self.z = z.detach().clone(memory_format=torch.contiguous_format)
        operator = None
        if factors is not None:
            made = multisecant(factors, settings.skip)
            # S is found through the table; the tensor here only says its dtype and strides.
            operator = Multisecant(S=made.S, V=torch.empty_like(made.V), n=torch.empty_like(made.n), high=made.high)
        q = torch.ones_like(self.z)  # any cotangents; random ones would move the user's generator
        self.state = TritonGcr.create(
            q, operator, min(settings.max_iter, MEMORY), settings.tol, FLOOR_EPS * settings.body_eps, triton_kernels("gcr"),
            begin=False,
        )  # fmt: skip
        self.state.poll_every, self.state.limit = 0, settings.max_iter
        self.state.table = torch.zeros(2, dtype=torch.int64, device=z.device)
        if isinstance(runner, EagerRunner):
            self.reason = "inner='eager' records its VJPs anew in every backward, which no graph can hold"
            return

        def once() -> None:
            self._load_operator(factors)
            self.before()
            self.trip()

        self.build(self, once, settings.max_iter, wanted)
        if operator is not None:
            self.state.forget_steps()

    def before(self) -> None:
        self.linear = self.runner.linearise(self.z, self.operands.tensors, self.needs)
        self.state.restart()

    def trip(self) -> None:
        self.state.move(self.linear.vjp(self.state.w), last=False, look=False)

    def _load_operator(self, factors: Factors | None) -> None:
        if factors is None:
            return
        made, own = multisecant(factors, self.settings.skip), self.state.operator
        assert own is not None
        assert self.state.table is not None
        own.V.copy_(made.V)
        own.n.copy_(made.n)
        self.state.table[0].fill_(made.S.data_ptr())

    def solve(
        self, z: Tensor, q: Tensor, operands: Sequence[Tensor], factors: Factors | None
    ) -> tuple[AdjointSolution, Linearised] | None:
        """As `region.adjoint.solve_adjoint` at z (B, D) for cotangents q (B, D); None where it cannot serve now. Waits for the
        end of the iteration: what is returned where a tolerance was missed is decided by the host."""
        if not self.enter(operands):
            return None
        assert self.engine is not None
        try:
            self.z.copy_(z)
            self.state.q.copy_(q)
            self._load_operator(factors)
            if not self.launch():
                return None
            _, vjps = self.engine.outcome()
            self.state.look()
            chosen, status = choose(self.state)
            found = certified_at(self.linear.vjp_full, q, chosen.clone(), status)
            return found.after(vjps), self.linear
        finally:
            self.leave()


def captured_adjoint(
    key: tuple[object, ...], runner: Runner, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...],
    factors: Factors | None, settings: AdjointSettings, wanted: str,
) -> CapturedAdjoint | Declined | None:  # fmt: skip
    """The captured adjoint for these shapes and settings; None where the loop serves (yet). `key` names the region and sizes."""
    steps = None if factors is None else (factors.S.shape, factors.S.stride(), factors.S.dtype)
    return find(
        (*key, "adjoint", settings, needs, steps), z, operands, wanted,
        lambda device, own: CapturedAdjoint(device, runner, z, own, needs, factors, settings, wanted),
    )  # fmt: skip
