"""Phantom gradients (Geng et al., arXiv 2111.05177), and the truncated Neumann series, which is one without damping."""

from __future__ import annotations

from torch import Tensor

from deq_compile.region.adjoint import AdjointSolution, phantom
from deq_compile.region.backward import BACKWARDS, AdjointCall, Backward
from deq_compile.region.body import Linearised


class Phantom(Backward):
    """``backward_steps`` applications, damped with ``backward_damping``."""

    name = "phantom"

    def damping(self, call: AdjointCall) -> float:
        return call.site.spec.config.backward_damping

    def solve(self, linear: Linearised, q: Tensor, call: AdjointCall) -> AdjointSolution:
        return phantom(linear.vjp, linear.vjp_full, q, call.site.spec.config.backward_steps, self.damping(call))


class Neumann(Phantom):
    """The first ``backward_steps`` terms of sum (J^T)^i q."""

    name = "neumann"

    def damping(self, call: AdjointCall) -> float:
        return 1.0


BACKWARDS.register(Phantom())
BACKWARDS.register(Neumann())
