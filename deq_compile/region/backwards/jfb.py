"""The Jacobian-free gradient, w = q (Fung et al., arXiv 2103.12803)."""

from __future__ import annotations

from torch import Tensor

from deq_compile.region.adjoint import AdjointSolution, jacobian_free
from deq_compile.region.backward import BACKWARDS, AdjointCall, Backward
from deq_compile.region.body import Linearised


class JacobianFree(Backward):
    """One VJP, at the cotangent itself."""

    name = "jfb"

    def solve(self, linear: Linearised, q: Tensor, call: AdjointCall) -> AdjointSolution:
        return jacobian_free(linear.vjp_full, q)


BACKWARDS.register(JacobianFree())
