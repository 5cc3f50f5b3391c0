"""The adjoint solve, captured: linearise, then trips of [VJP, move]; the operands' gradients are taken at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.broyden.gpu import Held
from deq_compile.kernels.broyden.state import row_width
from deq_compile.kernels.device import triton_kernels
from deq_compile.kernels.gcr.gpu import TritonGcr
from deq_compile.kernels.recycle import products, serves
from deq_compile.kernels.reuse import gpu as reuse_gpu
from deq_compile.kernels.reuse import multisecant
from deq_compile.kernels.reuse.multisecant import Multisecant, empty_weights
from deq_compile.kernels.tiles import offsets_fit
from deq_compile.region.adjoint import MEMORY, AdjointSolution, certified_at, choose
from deq_compile.region.body import Linearised, Runner
from deq_compile.region.pool import Way
from deq_compile.region.solvers import FLOOR_EPS
from deq_compile.region.status import AdjointStatus
from deq_compile.torch_parts import foreach_copy_

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
        self, device: Device, runner: Runner, z: Tensor, operands: Operands, needs: tuple[bool, ...], way: Way,
        settings: AdjointSettings, wanted: str,
    ) -> None:  # fmt: skip
        factors = way.factors
        super().__init__(device, operands)
        self.runner, self.needs, self.settings = runner, needs, settings
        self.z = z.detach().clone(memory_format=torch.contiguous_format)
        operator = None
        self.weights: tuple[Factors, reuse_gpu.Workspace] | None = None
        if factors is not None:
            # What the steps say is found through the table; the tensors here only say their dtypes and strides.
            like = replace(factors, S=factors.S.new_empty((1, 1, 16)), n=torch.empty_like(factors.n), native=None)
            operator = Multisecant(S=factors.S, V=empty_weights(factors), n=like.n, slots_written=factors.slots_written)
            if reuse_gpu.weighs(factors):
                self.weights = like, reuse_gpu.Workspace.like(factors.S)
        self.state = TritonGcr.create(
            self.z, operator, min(settings.max_iter, MEMORY), settings.tol, FLOOR_EPS * settings.body_eps,
            triton_kernels("gcr"), begin=False,
        )  # fmt: skip
        self.state.q = torch.ones_like(self.z)  # any cotangents; random ones would move the user's generator
        self.state.poll_every, self.state.limit = 0, settings.max_iter
        self.state.table = torch.zeros(3, dtype=torch.int64, device=z.device)
        if way.shared is not None and (made := products(way.shared, self.z)) is not None:
            self.state.products = made.own()
        self.points = Held()
        self.report, self.reported = device.pinned(8).view(torch.float64), device.event()
        if runner.records:
            self.reason = "inner='eager' records its VJPs anew in every backward, which no graph can hold"
            return

        def once() -> None:
            self._load_operator(factors)
            self.before()
            with self.state.idle():
                self.trip()

        self.build(self, once, settings.max_iter, wanted)
        if operator is not None:
            self.state.forget_steps()

    def before(self) -> None:
        """M from the forward's steps, the body linearised, and the first trial w = M q."""
        if self.weights is not None:
            like, capacity = self.weights
            operator, table = self.state.operator, self.state.table
            assert operator is not None
            reuse_gpu.make_weights(like, operator, self.settings.skip, triton_kernels("reuse"), table, capacity)
        self.linear = self.runner.linearise(self.z, self.operands.tensors, self.needs)
        self.state.restart()

    def trip(self) -> None:
        self.state.move(self.linear.vjp(self.state.w), last=False, look=False)

    def _load_operator(self, factors: Factors | None) -> None:
        if factors is None:
            return
        table, own = self.state.table, self.state.operator
        assert table is not None
        assert own is not None
        reuse_gpu.point_at(factors, table, triton_kernels("reuse"), self.points)
        if self.weights is None:  # what no kernel makes is made outside the graph
            made = multisecant(factors, self.settings.skip)
            own.V.copy_(made.V)
            own.n.copy_(made.n)

    def solve(self, z: Tensor, q: Tensor, operands: Sequence[Tensor], way: Way) -> tuple[AdjointSolution, Linearised] | None:
        """As `region.adjoint.solve_adjoint` at z (B, D) for cotangents q (B, D); None where it cannot serve now.

        The gradients at the last estimate are enqueued before the host knows whether the iteration has converged; then one wait
        tells. Where it has not, the host decides what is returned, at the price of another VJP."""
        if not self.enter(operands):
            return None
        assert self.engine is not None
        try:
            foreach_copy_([self.z, self.state.q], [z, q])
            self._load_operator(way.factors)
            if way.shared is not None and self.state.products is not None:
                self.state.products.load(way.shared)
            if not self.launch():
                return None
            state, w = self.state, self.state.w.clone()
            jw, payload = self.linear.vjp_full(w)
            norms = torch.linalg.vector_norm(q + jw.to(q.dtype) - w, dim=1)
            residuals = torch.where(state.norms > 0, norms / state.norms, 0.0)
            whole = torch.linalg.vector_norm(norms.masked_fill(state.norms == 0, 0.0), dim=0, keepdim=True)
            self.report.copy_(torch.cat([whole, state.norm_of_batch, state.outcome]).double(), non_blocking=True)
            self.reported.record()
            self.reported.synchronize()
            _, vjps = self.engine.outcome()
            left, scale, state.batch, ended = self.report.tolist()
            state.converged = bool(ended)
            residual = left / scale if scale else 0.0
            status = AdjointStatus.CONVERGED if math.isfinite(residual) else AdjointStatus.NONFINITE
            if not ended:
                chosen, status = choose(state)
                if not torch.equal(chosen, w):
                    found = certified_at(self.linear.vjp_full, q, chosen.clone(), status)
                    return replace(found, vjps=vjps + 2, needed=vjps), self.linear
            return AdjointSolution(w, payload, vjps + 1, vjps, residual, residuals, status), self.linear
        finally:
            self.leave()


def captured_adjoint(
    key: tuple[object, ...], runner: Runner, z: Tensor, operands: Sequence[Tensor], needs: tuple[bool, ...],
    way: Way, settings: AdjointSettings, wanted: str,
) -> CapturedAdjoint | Declined | None:  # fmt: skip
    """The captured adjoint for these shapes and settings; None where the loop serves (yet).

    Args:
        key: names the region and sizes.
        way: factors of the forward that M is made of, and what comes before M; no graph has built in more than their sizes.
    """
    factors, shared = way.factors, way.shared
    if shared is not None and not serves(shared, z):
        return None
    rows = 2 * min(settings.max_iter, MEMORY)
    if not offsets_fit(rows, row_width(z.shape[1], z.device)):
        return None
    steps = None if factors is None else (factors.S.shape, factors.S.stride(), factors.S.dtype)
    return find(
        (*key, "adjoint", settings, needs, steps, 0 if shared is None else shared.rank), z, operands, wanted,
        lambda device, own: CapturedAdjoint(device, runner, z, own, needs, way, settings, wanted),
    )  # fmt: skip
