"""The implicit gradient: the adjoint solved to a tolerance, preconditioned with the forward's factors where that pays."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.kernels.device import on_gpu
from deq_compile.region import records
from deq_compile.region.adjoint import AdjointProblem, AdjointSolution, solve_adjoint
from deq_compile.region.backward import BACKWARDS, AdjointCall, Backward
from deq_compile.region.backwards.policy import factors_pay
from deq_compile.region.backwards.recycled import solve_recycled
from deq_compile.region.body import Linearised
from deq_compile.region.pool import Way
from deq_compile.region.site import Site
from deq_compile.region.verdict import measure_gradient
from deq_compile.region.warm import Start, adjoint_from, begins_from


class Reuse(Backward):
    """w = q + J^T w to ``backward_tol``; inf: one raw reuse of the forward's inverse Jacobian."""

    name = "reuse"
    wants_factors = True
    gradient = "implicit"

    def solve(self, linear: Linearised, q: Tensor, call: AdjointCall) -> AdjointSolution:
        site, settled, raw = call.site, call.settled, math.isinf(call.site.spec.config.backward_tol)
        factors = call.factors
        if factors is None and raw and site.spec.stores_steps:  # then the gradient is made of them
            factors = call.again()
        asked = not (raw or call.inside)
        measures = asked and not settled.done and q.numel() > 0 and site.gradient_due()
        tol, expected = call.tol, call.expected
        may = on_gpu(q.device) and asked and not measures and (settled.captured or not settled.done)
        recycles = asked and call.recycled is not None
        if may and not recycles and (found := call.captured(_usual(factors))) is not None:
            site.expected_vjps = found.needed
            settled.settle(tol, expected, _usual(factors).name, captured=True)
            return found
        # Asked on a CPU only: elsewhere the matrix products run ahead of the host, and the factors' cost is another.
        asks = asked and not on_gpu(q.device)
        warm = asked and call.recycled is None and begins_from(call.warm, q)
        if warm:
            way = _usual(factors if call.reuses else None)
            site.backwards += not settled.done
            found = adjoint_from(cast("Start", call.warm), linear, q, way.factors, _problem(call, q))
        else:
            found, way = self._recycled(linear, q, call, may) if recycles else self._solve(linear, q, call, factors, asks)
        if measures:

            def attempt(tol: float) -> AdjointSolution:
                """As a later backward through the same forward finds it at this tolerance."""
                problem = dataclasses.replace(_problem(call, q), tol=tol, expected=None, shared=way.shared)
                if warm:
                    return adjoint_from(cast("Start", call.warm), linear, q, way.factors, problem)
                return solve_adjoint(linear.vjp, linear.vjp_full, q, way.factors, problem)

            found = measure_gradient(site, found, attempt)
            if site.backward_tol != tol:
                tol, expected = site.backward_tol, None
        settled.settle(tol, expected, way.name, captured=found.captured)
        return _noted(site, found)

    def _recycled(self, linear: Linearised, q: Tensor, call: AdjointCall, may: bool) -> tuple[AdjointSolution, Way]:
        """The adjoint by what earlier batches have left, or not; `may`: a captured graph may give it."""
        assert call.recycled is not None
        if not q.numel() or call.site.spec.config.backward_max_iter <= 0:
            return self._solve(linear, q, call, call.factors, not on_gpu(q.device))
        try:
            return solve_recycled(linear, q, call, call.recycled, _problem(call, q), captures=may)
        finally:
            call.site.backwards += not call.settled.done

    def _solve(
        self, linear: Linearised, q: Tensor, call: AdjointCall, factors: Factors | None, asks: bool
    ) -> tuple[AdjointSolution, Way]:
        """The adjoint, and the way it was preconditioned; `asks`: it may be asked which way pays."""
        site, problem = call.site, _problem(call, q)
        due = asks and factors is not None and not call.settled.done and site.reuse_due()
        if asks and not (due or call.reuses):
            factors = None
        site.backwards += not call.settled.done
        found = solve_adjoint(linear.vjp, linear.vjp_full, q, factors, problem)
        if due and factors is not None and q.numel():
            site.reuse(factors_pay(linear.vjp, q, factors, found, problem))
            if not site.reuses:  # this very call's gradient is that of the calls after it
                factors = None
                found = solve_adjoint(linear.vjp, linear.vjp_full, q, None, problem)
        return found, _usual(factors)


def _usual(factors: Factors | None) -> Way:
    return Way("plain" if factors is None else "factors", factors)


def _noted(site: Site, found: AdjointSolution) -> AdjointSolution:
    """The same, with what the next adjoint wants to know of it noted."""
    site.expected_vjps = found.needed
    if site.warm is not None:
        site.warm.last = Start(found.w.clone(), found.needed)  # what is handed on may be changed in place
    return found


def _problem(call: AdjointCall, q: Tensor) -> AdjointProblem:
    site, config = call.site, call.site.spec.config
    estimate = records.recording() and not on_gpu(q.device)
    facts = call.tol, call.expected, call.inside, estimate
    known = site.adjoint_problem
    if known[0] != facts:
        asked = AdjointProblem(
            tol=call.tol,
            max_iter=max(1, config.backward_max_iter),
            expected=call.expected,
            body_eps=site.spec.body_eps,
            skip=skipped_pairs(site),
            watched=not call.inside,
            estimate=estimate,
        )
        known = site.adjoint_problem = facts, asked
    found: AdjointProblem = known[1]
    return found


def skipped_pairs(site: Site) -> int:
    """A restart may have left two pairs that are not exact."""
    config = site.spec.config
    return 2 if config.memory < config.max_iter else 0


BACKWARDS.register(Reuse())
